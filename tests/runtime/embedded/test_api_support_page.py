"""docs/popart-support.md says what the code registers, now."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from popart_models import popart

FOLDER = Path(__file__).resolve().parents[3] / "docs"
SPEC = importlib.util.spec_from_file_location("make_popart_support", FOLDER / "make_popart_support.py")
maker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(maker)


def test_the_page_is_up_to_date():
    found = (FOLDER / "popart-support.md").read_text()
    assert found == maker.page(), "run: python docs/make_popart_support.py"


def test_an_op_that_is_not_registered_shows_as_refused(monkeypatch):
    from popart._engine import registry

    here = dict(registry.registered())
    here[("ai.onnx", "Conv")] = (1,)
    del here[("ai.graphcore", "Gelu")]
    monkeypatch.setattr(registry, "registered", lambda: here)
    page = maker.page()
    assert "| Conv | 1 | 1 | 1 | 1 | 1 | refused |" in page
    assert "| Gelu | 1 | yes | refused |" in page


unsupported = popart.errors.unsupported


class Sample:
    """What the page has to tell apart."""

    def works(self):
        """Does something."""
        return 1

    def refuses(self):
        """Says no."""
        raise unsupported("refuses")

    def sometimes(self, value):
        if value:
            raise unsupported("sometimes")
        return value


def test_a_method_that_only_raises_is_refused_and_one_that_may_is_in_part():
    statuses = {name: maker._status(vars(Sample)[name]) for name in ("works", "refuses", "sometimes")}
    assert statuses == {"works": "supported", "refuses": "refused", "sometimes": "in part"}


@pytest.mark.parametrize("name, policy", [
    (name, field.policy) for name, field in popart.options.FIELDS.items()
    if field.policy not in (popart.options.NEUTRAL, popart.options.USED)
])  # fmt: skip
def test_refused_options_show_their_remedy(name, policy):
    row = next(line for line in maker.page().splitlines() if line.startswith(f"| `{name}` |"))
    assert "refused unless it is the default" in row and policy in row
