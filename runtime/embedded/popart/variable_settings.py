"""VariableSettings: which replicas share a variable, and how its value comes back to the host."""
from .enums import CommGroupType, VariableRetrievalMode
from .errors import popart_exception
from .replica_grouping import CommGroup, ReplicaGrouping, grouping_of

_SIZED = (CommGroupType.Consecutive, CommGroupType.Orthogonal)


class VariableSettings:
    """PopART's overloads: `()`, `(CommGroup)`, `(VariableRetrievalMode)`, `(CommGroup, VariableRetrievalMode)` and
    `(stride, groupSize, mode)`. The default is one value for all replicas, read from one of them.
    """

    def __init__(self, *args, **keywords):
        group, mode, stride, size = _arguments(args, keywords)
        self._group, self._mode = group, mode
        self._stride, self._size = stride, size
        self.verify()

    def verify(self):
        """Raises popart_exception for a grouping that cannot exist."""
        if self._group is None:
            if self._stride < 1 or self._size < 1:
                raise popart_exception(
                    f"Bad VariableSettings: stride ({self._stride}) and group size ({self._size}) must be at least 1"
                )
        elif self._group.type in _SIZED and self._group.replicaGroupSize < 1:
            raise popart_exception(f"Bad VariableSettings: the group size of {self._group!r} must be at least 1")

    def getSharedVariableDomain(self):
        if self._group is None:
            raise popart_exception("This VariableSettings has a stride and a group size, not a CommGroup")
        return self._group

    def getReplicaGrouping(self, numReplicas):
        if self._group is None:
            return ReplicaGrouping(numReplicas, self._stride, self._size)
        return grouping_of(self._group, numReplicas)

    def isUsingCommGroup(self):
        return self._group is not None

    def getCommGroupType(self):
        return self.getSharedVariableDomain().type

    def getStride(self):
        if self._group is not None:
            raise popart_exception("This VariableSettings has a CommGroup, not a stride")
        return self._stride

    def getGroupSize(self):
        return self._size if self._group is None else self._group.replicaGroupSize

    def getRetrievalMode(self):
        return self._mode

    def numReplicasReturningVariable(self, replicaCount):
        """How many values the host gets: one a group, or one a replica with AllReplicas."""
        if self._mode is VariableRetrievalMode.AllReplicas:
            return replicaCount
        return self.getGroupCount(replicaCount)

    def getGroupCount(self, replicaCount):
        return self.getReplicaGrouping(replicaCount).getNumGroups()

    def getRealGroupSize(self, replicaCount):
        return self.getReplicaGrouping(replicaCount).getGroupSize()

    def getGroupRepresentative(self, group):
        """The replica that speaks for a group: its first one."""
        if self._group is None:
            block, offset = divmod(group, self._stride)
            return block * self._stride * self._size + offset
        if self._group.type is CommGroupType.All:
            return 0
        return group * self._group.replicaGroupSize if self._group.type is CommGroupType.Consecutive else group

    def shapeOnReplica(self, full_shape, replicaCount, name=""):
        """The shape of the variable in one replica, from the host's: without the axis of groups when there are several."""
        returned, shape = self.getGroupCount(replicaCount), list(full_shape)
        if returned == 1:
            return shape
        if not shape or shape[0] != returned:
            raise popart_exception(
                f"Return factor ({returned}) of variable '{name}' does not match the outer dimension of its shape {shape}: "
                f"the host's array has one value for each of the {returned} groups"
            )
        return shape[1:]

    def shapeOnHost(self, replica_shape, replicaCount):
        """The shape of what the host reads: with an axis in front when several replicas return the variable."""
        returned = self.numReplicasReturningVariable(replicaCount)
        return list(replica_shape) if returned == 1 else [returned, *replica_shape]

    def groups(self, replicaCount):
        """[[replica, ...], ...], one list a group."""
        found = self.getReplicaGrouping(replicaCount)
        return [found.getReplicasAt(group) for group in range(found.getNumGroups())]

    def __repr__(self):
        group = f"stride={self._stride}, groupSize={self._size}" if self._group is None else repr(self._group)
        return f"VariableSettings({group}, {self._mode.name})"


def _arguments(args, keywords):
    """(CommGroup or None, mode, stride, group size)."""
    group, mode, numbers = CommGroup(), VariableRetrievalMode.OnePerGroup, []
    names = {"sharedVariableDomain_", "retrievalMode_", "stride", "groupSize", "mode"}
    if not names.issuperset(keywords):
        raise TypeError(f"VariableSettings: unexpected keyword arguments {sorted(set(keywords) - names)}")
    numbers = [keywords[name] for name in ("stride", "groupSize") if name in keywords]
    for value in (*args, *(keywords[n] for n in ("sharedVariableDomain_", "retrievalMode_", "mode") if n in keywords)):
        if isinstance(value, CommGroup):
            group = value
        elif isinstance(value, VariableRetrievalMode):
            mode = value
        elif hasattr(value, "__index__") and not isinstance(value, bool):
            numbers.append(int(value))
        else:
            raise TypeError(f"VariableSettings(): incompatible constructor argument {value!r}")
    if len(numbers) not in (0, 2):
        raise TypeError("VariableSettings(): stride and groupSize go together")
    return (None, mode, *numbers) if numbers else (group, mode, 0, 0)
