"""VariableSettings, CommGroup, ReplicaGrouping: groups against an enumeration by hand."""
from __future__ import annotations

import importlib

import numpy as np
import pytest
from popart_models import popart

Kind, Mode, Group = popart.CommGroupType, popart.VariableRetrievalMode, popart.CommGroup


def by_hand(kind, size, replicas):
    """Groups as PopART's documentation draws them."""
    numbers = np.arange(replicas)
    if kind is Kind.All:
        return [numbers.tolist()]
    if kind is Kind.Ungrouped:
        return [[n] for n in numbers.tolist()]
    table = numbers.reshape(-1, size) if kind is Kind.Consecutive else numbers.reshape(size, -1).T
    return table.tolist()


CASES = [(kind, size, replicas) for kind in Kind for size in (1, 2, 4) for replicas in (4, 8)]


@pytest.mark.parametrize("kind, size, replicas", CASES)
@pytest.mark.parametrize("mode", [Mode.OnePerGroup, Mode.AllReplicas, Mode.AllReduceReplicas])
def test_groups_and_shapes(kind, size, replicas, mode):
    settings, wanted = popart.VariableSettings(Group(kind, size), mode), by_hand(kind, size, replicas)
    assert settings.groups(replicas) == wanted
    assert settings.getGroupCount(replicas) == len(wanted)
    assert settings.getRealGroupSize(replicas) == len(wanted[0])
    assert [settings.getGroupRepresentative(g) for g in range(len(wanted))] == [group[0] for group in wanted]
    returned = replicas if mode is Mode.AllReplicas else len(wanted)
    assert settings.numReplicasReturningVariable(replicas) == returned
    assert settings.shapeOnHost([3, 5], replicas) == ([3, 5] if returned == 1 else [returned, 3, 5])
    full = [3, 5] if len(wanted) == 1 else [len(wanted), 3, 5]
    assert settings.shapeOnReplica(full, replicas, "w") == [3, 5]


@pytest.mark.parametrize("replicas, stride, size", [(8, 1, 2), (8, 2, 2), (8, 4, 2), (12, 3, 2), (8, 1, 8), (6, 1, 1)])
def test_strided_groups_are_a_partition_with_that_stride(replicas, stride, size):
    settings = popart.VariableSettings(stride, size, Mode.OnePerGroup)
    groups = settings.groups(replicas)
    assert sorted(r for group in groups for r in group) == list(range(replicas)) and len(groups) == replicas // size
    assert all(b - a == stride for group in groups for a, b in zip(group, group[1:]))
    assert (settings.getStride(), settings.getGroupSize(), settings.isUsingCommGroup()) == (stride, size, False)
    grouping = settings.getReplicaGrouping(replicas)
    for index, group in enumerate(groups):
        assert settings.getGroupRepresentative(index) == group[0] and grouping.getReplicasAt(index) == group
        assert [(grouping.getGroupIndexAt(r), grouping.getIndexInGroupAt(r)) for r in group] == [
            (index, i) for i in range(size)
        ]


def test_overloads_and_defaults():
    plain = popart.VariableSettings()
    assert plain.getSharedVariableDomain() == Group(Kind.All, 0) and plain.getRetrievalMode() is Mode.OnePerGroup
    assert popart.VariableSettings(Mode.AllReplicas).getCommGroupType() is Kind.All
    both = popart.VariableSettings(sharedVariableDomain_=Group(Kind.Consecutive, 2), retrievalMode_=Mode.AllReplicas)
    assert (both.getGroupSize(), both.getRetrievalMode(), both.isUsingCommGroup()) == (2, Mode.AllReplicas, True)


def test_bad_settings_are_refused():
    with pytest.raises(popart.popart_exception, match=r"group size of .* must be at least 1"):
        popart.VariableSettings(Group(Kind.Consecutive, 0))
    with pytest.raises(popart.popart_exception, match="stride"):
        popart.VariableSettings(0, 2, Mode.OnePerGroup)
    with pytest.raises(popart.popart_exception, match="does not match the outer dimension"):
        popart.VariableSettings(Group(Kind.Ungrouped, 0)).shapeOnReplica([3, 5], 2, "w")
    with pytest.raises(popart.popart_exception, match="does not divide"):
        popart.VariableSettings(Group(Kind.Consecutive, 3)).groups(4)
    for arguments in (("All",), (2,), (Group(), 1)):
        with pytest.raises(TypeError):
            popart.VariableSettings(*arguments)


def test_comm_group_of_a_grouping_is_that_grouping():
    for kind, size, replicas in CASES:
        grouping = popart.VariableSettings(Group(kind, size)).getReplicaGrouping(replicas)
        again = popart.VariableSettings(grouping.toCommGroup()).getReplicaGrouping(replicas)
        assert again == grouping
    assert popart.ReplicaGrouping(8, 2, 2).toCommGroup() is None


def test_transpose_swaps_the_two_indices():
    for stride, size in ((1, 2), (4, 2), (1, 8), (1, 1), (2, 4)):
        grouping = popart.ReplicaGrouping(8, stride, size)
        other = grouping.getTranspose()
        for replica in range(8):
            assert other.getGroupIndexAt(replica) == grouping.getIndexInGroupAt(replica)
    with pytest.raises(popart.popart_exception, match="no constant stride"):
        popart.ReplicaGrouping(8, 2, 2).getTranspose()
    with pytest.raises(popart.popart_exception, match="divisible by the group size"):
        popart.ReplicaGrouping(8, 1, 3)


def test_settings_come_back_from_a_builder_model():
    import onnx

    groups = importlib.import_module("popart._engine.variable_groups")
    builder, wanted = popart.Builder(), popart.VariableSettings(Group(Kind.Orthogonal, 2), Mode.AllReplicas)
    w = builder.addInitializedInputTensor(np.ones((2, 3), np.float32), wanted, "w")
    v = builder.addInitializedInputTensor(np.ones((2, 3), np.float32), "v")
    u = builder.addInitializedInputTensor(np.ones(2, np.float32), popart.VariableSettings(2, 2, Mode.OnePerGroup), "u")
    model = onnx.load_from_string(builder.getModelProto())
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    found = groups.settings_of(metadata, [w, v, u])
    assert found[u].groups(4) == [[0, 2], [1, 3]]
    assert found[w].getSharedVariableDomain() == Group(Kind.Orthogonal, 2)
    assert found[w].getRetrievalMode() is Mode.AllReplicas
    assert found[v].groups(4) == [[0, 1, 2, 3]]
    with pytest.raises(popart.popart_exception, match=r"does not support VariableSettings.*'w' with 4 replicas"):
        groups.refuse_grouped(metadata, [w, v], 4)
    groups.refuse_grouped(metadata, [v], 4)


def test_a_reduction_on_reading_is_refused_where_it_could_matter():
    groups = importlib.import_module("popart._engine.variable_groups")
    metadata = {"__comm_group_type/w": str(int(Kind.All)), "__comm_group_size/w": "0",
                "__variable_settings/w": str(int(Mode.AllReduceReplicas))}  # fmt: skip
    groups.refuse_grouped(metadata, ["w"], 1)
    with pytest.raises(popart.popart_exception, match=r"does not support VariableSettings.*'w' with 2 replicas"):
        groups.refuse_grouped(metadata, ["w"], 2)
