"""Published stage maps as data: one "ipu_stage" (or "ipu") per block of a Faster R-CNN C4.

The placements are those of Graphcore's published example, written for the ResNet-50 C4 detector.
"""
from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Dict, FrozenSet, Iterable, List, Mapping, Optional, Set, Tuple

from runtime.errors import GraphError

# Modules that only one of the two graphs holds: one stage map serves both graphs.
ONLY_IN: Dict[str, FrozenSet[str]] = {
    "train": frozenset({"rpn_target", "rpn_loss", "proposal_target", "roi_loss", "total_loss"}),
    "infer": frozenset({"detections"}),
}


@dataclass(frozen=True)
class Block:
    """Module prefixes that a preset places together. An `optional` prefix may be absent: a folded norm, a loss."""

    label: str
    required: Tuple[str, ...]
    optional: Tuple[str, ...] = ()


def _bottleneck(index: int) -> Tuple[Block, Block]:
    path = f"roi_head.layer4.{index}"
    return (Block(f"res5 part {2 * index + 1}", (f"{path}.conv1", f"{path}.conv2"),
                  (f"{path}.norm1", f"{path}.norm2")),
            Block(f"res5 part {2 * index + 2}", (f"{path}.conv3",), (f"{path}.norm3", f"{path}.downsample")))


# What lies between (the ReLUs and the sum of a bottleneck, pooling) has no entry: it follows its producers.
BLOCKS: Tuple[Block, ...] = (
    Block("stem, layer1, layer2", ("backbone.stem", "backbone.layer1", "backbone.layer2")),
    Block("layer3", ("backbone.layer3",)),
    Block("rpn conv", ("rpn",)),
    Block("rpn proposal", ("proposal_layer",), ("rpn_target", "rpn_loss")),
    Block("proposal target", (), ("proposal_target",)),
    Block("roi_align", ("roi_align",)),
    *_bottleneck(0), *_bottleneck(1), *_bottleneck(2),
    Block("box head", ("box_predictor",), ("roi_loss", "total_loss", "detections")),
)


@dataclass(frozen=True)
class Preset:
    """`places` holds one "ipu_stage" or "ipu" for each of BLOCKS, in order."""

    name: str
    ipus: int
    meant_for: str
    places: Tuple[str, ...]


PRESETS: Dict[str, Preset] = {preset.name: preset for preset in (
    Preset("r50c4-mixed-4ipu", 4, "mixed precision training, pipelined",
           ("0_0", "0_0", "1_1", "1_1", "1_1", "1_1", "2_2", "2_2", "2_2", "3_3", "3_3", "3_3", "3_3")),
    Preset("r50c4-fp32-8ipu", 8, "float32 training, no pipelining",
           ("0", "7", "1", "1", "1", "3", "6", "3", "4", "2", "7", "5", "5")),
)}


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises GraphError with the nearest known one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, [*PRESETS, "auto"], n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"known: auto, {', '.join(PRESETS)}, or a map of module prefixes"
    raise GraphError(f"compile.stages '{name}' is no preset; {hint}")


def expand_preset(preset: Preset, modules: Iterable[str], pipelining: bool) -> Tuple[Dict[str, str], List[str]]:
    """(module prefix -> "ipu_stage" or "ipu", notes) of `preset` for a graph that holds `modules`.

    A preset without stages gets one stage for each change of IPU along the blocks when `pipelining` asks for stages.
    Raises GraphError when the graph lacks a module that the preset places.
    """
    known = all_prefixes(modules)
    places, notes = _with_stages(preset) if pipelining else (preset.places, [])
    expanded: Dict[str, str] = {}
    for block, place in zip(BLOCKS, places):
        for prefix in block.required:
            if prefix not in known:
                raise GraphError(f"preset {preset.name} places the block '{block.label}', but this graph has no module "
                                 f"'{prefix}'{nearest(prefix, known)}; it is written for resnet50 C4: use stages: auto "
                                 "or an explicit map")
        expanded.update({prefix: place for prefix in (*block.required, *block.optional) if prefix in known})
    return expanded, notes


def other_kind_only(kind: str) -> FrozenSet[str]:
    """Module names that this kind of graph cannot hold, since they belong to the other kind."""
    return frozenset().union(*(names for other, names in ONLY_IN.items() if other != kind))


def all_prefixes(modules: Iterable[str]) -> FrozenSet[str]:
    """Every dotted prefix of the module paths, themselves included."""
    found: Set[str] = set()
    for module in modules:
        parts = module.split(".")
        found.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return frozenset(found)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (nearest: 'x')` for messages, "" when nothing is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f" (nearest: '{near[0]}')" if near else ""


def longest_prefix(module: str, places: Mapping[str, object]) -> Optional[str]:
    """The longest key of `places` that is `module` or one of its dotted parents."""
    while module:
        if module in places:
            return module
        module = module.rpartition(".")[0]
    return None


def _with_stages(preset: Preset) -> Tuple[Tuple[str, ...], List[str]]:
    if all("_" in place for place in preset.places):
        return preset.places, []
    places, stage = [], -1
    for index, ipu in enumerate(preset.places):
        stage += index == 0 or ipu != preset.places[index - 1]
        places.append(f"{ipu}_{stage}")
    return tuple(places), [
        f"preset {preset.name} is for {preset.meant_for}: pipelined, its IPU ids would be stages that "
        "decrease along the network, which PopART refuses; the nearest legal placement keeps every IPU and opens a "
        f"stage at each change of IPU ({stage + 1} stages, so gradient accumulation must be at least {2 * stage + 1})"]
