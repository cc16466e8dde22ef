"""VariableSettings as a model's metadata holds them: what a session has to know about its initializers."""
from __future__ import annotations

from collections.abc import Iterable

from ..enums import CommGroupType, VariableRetrievalMode
from ..errors import popart_exception, unsupported
from ..replica_grouping import CommGroup
from ..variable_settings import VariableSettings

_TYPE, _STRIDE = "__comm_group_type/", "__variable_stride/"
_SIZE, _MODE = "__comm_group_size/", "__variable_settings/"


def settings_of(metadata: dict[str, str], names: Iterable[str]) -> dict[str, VariableSettings]:
    """{initializer: VariableSettings} of those that the Builder gave some; metadata: the model's metadata_props."""
    found = {}
    for name in names:
        if _TYPE + name not in metadata and _STRIDE + name not in metadata:
            continue
        try:
            size, mode = int(metadata.get(_SIZE + name, 0)), VariableRetrievalMode(int(metadata.get(_MODE + name, 0)))
            if _STRIDE + name in metadata:
                found[name] = VariableSettings(int(metadata[_STRIDE + name]), size, mode)
            else:
                found[name] = VariableSettings(CommGroup(CommGroupType(int(metadata[_TYPE + name])), size), mode)
        except (ValueError, TypeError) as error:
            raise popart_exception(f"The model's metadata about the variable '{name}' is wrong: {error}") from None
    return found


def refuse_grouped(metadata: dict[str, str], names: Iterable[str], replicas: int) -> None:
    """Raises for a variable that differs between replicas, that several return, or that is reduced when it is read."""
    for name, settings in settings_of(metadata, names).items():
        reduced = replicas > 1 and settings.getRetrievalMode() is VariableRetrievalMode.AllReduceReplicas
        if reduced or settings.getGroupCount(replicas) > 1 or settings.numReplicasReturningVariable(replicas) > 1:
            raise unsupported(
                f"{settings!r} of the variable '{name}' with {replicas} replicas",
                "Give it one value for all replicas: VariableSettings().",
            )
