"""Apply every rule that PopART applies when a session is created; changes nothing.

The rules are functions, one each, in popart_op_rules.py (ops, types, constants, attributes, names) and
popart_placement_rules.py (virtual graphs, pipeline stages, weights, loss). All violations are reported together, each
with node, module path and remedy.
"""
from __future__ import annotations

from typing import List, Optional

from graph_passes.graph import Graph
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from graph_passes.popart_op_rules import OP_RULES, wide_inputs
from graph_passes.popart_placement_rules import PLACEMENT_RULES, untrained
from graph_passes.popart_rule import Case, Violation
from runtime.errors import GraphError

MOST_REPORTED = 20


class VerifyPopart(GraphPass):
    """`accumulation`: gradient accumulation factor of the training session to come, None when it is not known yet."""

    name = "verify_popart"

    def __init__(self, accumulation: Optional[int] = None) -> None:
        self.accumulation = accumulation

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Raises one GraphError listing up to 20 violations."""
        accumulation = context.accumulation if self.accumulation is None else self.accumulation
        violations = find_violations(graph, context, accumulation)
        if violations:
            raise GraphError(violation_report(violations))
        case = Case(graph, context, accumulation)
        rules = len(OP_RULES) + len(PLACEMENT_RULES)
        return PassResult(0, [f"{rules} rules of PopART hold", *wide_inputs(case), *untrained(case)])


def find_violations(graph: Graph, context: PassContext, accumulation: Optional[int] = None) -> List[Violation]:
    """Every violation, in the order of the rules."""
    case = Case(graph, context, accumulation)
    return [violation for rule in (*OP_RULES, *PLACEMENT_RULES) for violation in rule(case)]


def violation_report(violations: List[Violation]) -> str:
    """One message for all of them, the first 20 in full."""
    count = len(violations)
    lines = [f"PopART would refuse this graph: {count} violation{'s' if count > 1 else ''}"]
    lines += [f"  {violation}" for violation in violations[:MOST_REPORTED]]
    if count > MOST_REPORTED:
        lines.append(f"  ... and {count - MOST_REPORTED} more")
    return "\n".join(lines)
