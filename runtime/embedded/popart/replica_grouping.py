"""CommGroup and ReplicaGrouping: which replicas belong together."""
from .enums import CommGroupType
from .errors import popart_exception


class CommGroup:
    """`CommGroup()` is all replicas; `CommGroup(CommGroupType.Consecutive, 2)` pairs of neighbours."""

    def __init__(self, type=CommGroupType.All, replicaGroupSize=0):
        if not isinstance(type, CommGroupType):
            raise TypeError(f"CommGroup: type is a {type.__class__.__name__}, not a CommGroupType")
        if isinstance(replicaGroupSize, bool) or not hasattr(replicaGroupSize, "__index__") or replicaGroupSize < 0:
            raise TypeError(f"CommGroup: replicaGroupSize must be an int of at least 0, not {replicaGroupSize!r}")
        self.type, self.replicaGroupSize = type, int(replicaGroupSize)

    def __eq__(self, other):
        if not isinstance(other, CommGroup):
            return NotImplemented
        return (self.type, self.replicaGroupSize) == (other.type, other.replicaGroupSize)

    def __hash__(self):
        return hash((self.type, self.replicaGroupSize))

    def __repr__(self):
        return f"CommGroup(type={self.type.name}, replicaGroupSize={self.replicaGroupSize})"


class ReplicaGrouping:
    """numReplicas replicas in groups of groupSize whose members are `stride` apart.

    `ReplicaGrouping(8, 1, 2)` is (0,1)(2,3)(4,5)(6,7); `ReplicaGrouping(8, 4, 2)` is (0,4)(1,5)(2,6)(3,7);
    `ReplicaGrouping(8)` is one group of all.
    """

    def __init__(self, numReplicas, stride=1, groupSize=None):
        groupSize = numReplicas if groupSize is None else groupSize
        for name, value in (("number of replicas", numReplicas), ("stride", stride), ("group size", groupSize)):
            if value < 1:
                raise popart_exception(f"The {name} must be a positive integer, not {value}")
        if groupSize == 1:
            stride = 1  # PopART's normal form: the stride of a group of one means nothing
        if groupSize > numReplicas or numReplicas % groupSize:
            raise popart_exception(
                f"The number of replicas ({numReplicas}) must be divisible by the group size ({groupSize})"
            )
        if groupSize > 1 and numReplicas % (stride * groupSize):
            raise popart_exception(
                f"The number of replicas ({numReplicas}) must be divisible by the stride times the group size "
                f"({stride} * {groupSize})"
            )
        self._replicas, self._stride, self._size = int(numReplicas), int(stride), int(groupSize)

    def getNumReplicas(self):
        return self._replicas

    def getStride(self):
        return self._stride

    def getGroupSize(self):
        return self._size

    def getNumGroups(self):
        return self._replicas // self._size

    def getGroupIndexAt(self, replica):
        self._check(replica, self._replicas, "replica index")
        return replica // (self._stride * self._size) * self._stride + replica % self._stride

    def getIndexInGroupAt(self, replica):
        self._check(replica, self._replicas, "replica index")
        return replica // self._stride % self._size

    def getReplicaAt(self, groupIndex, indexInGroup=0):
        self._check(groupIndex, self.getNumGroups(), "group index")
        self._check(indexInGroup, self._size, "index in the group")
        block, offset = divmod(groupIndex, self._stride)
        return block * self._stride * self._size + offset + indexInGroup * self._stride

    def getReplicasAt(self, groupIndex):
        return [self.getReplicaAt(groupIndex, index) for index in range(self._size)]

    def getTranspose(self):
        """The grouping whose groups hold the replicas that have the same index in their group here."""
        if 1 < self._stride < self.getNumGroups():
            raise popart_exception(f"The transpose of {self!r} has no constant stride")
        if self._size == 1:
            return ReplicaGrouping(self._replicas)
        if self._size == self._replicas:
            return ReplicaGrouping(self._replicas, 1, 1)
        return ReplicaGrouping(self._replicas, self._size if self._stride == 1 else 1, self.getNumGroups())

    def toCommGroup(self):
        """The same as a CommGroup; None where a CommGroup cannot say it."""
        if self._size == self._replicas:
            return CommGroup(CommGroupType.All, 0)
        if self._size == 1:
            return CommGroup(CommGroupType.Ungrouped, 0)
        if self._stride == 1:
            return CommGroup(CommGroupType.Consecutive, self._size)
        return CommGroup(CommGroupType.Orthogonal, self._size) if self._stride == self.getNumGroups() else None

    @staticmethod
    def _check(value, limit, what):
        if not 0 <= value < limit:
            raise popart_exception(f"The {what} must be in [0, {limit}), not {value}")

    def __eq__(self, other):
        if not isinstance(other, ReplicaGrouping):
            return NotImplemented
        return vars(self) == vars(other)

    def __hash__(self):
        return hash((self._replicas, self._stride, self._size))

    def __repr__(self):
        return f"ReplicaGrouping(numReplicas={self._replicas}, stride={self._stride}, groupSize={self._size})"


def grouping_of(group, replicas):
    """ReplicaGrouping of a CommGroup over this many replicas."""
    if group.type is CommGroupType.All:
        return ReplicaGrouping(replicas)
    if group.type is CommGroupType.Ungrouped:
        return ReplicaGrouping(replicas, 1, 1)
    size = group.replicaGroupSize
    if size < 1 or replicas % size:
        raise popart_exception(f"The group size {size} of {group!r} does not divide the {replicas} replicas")
    return ReplicaGrouping(replicas, 1 if group.type is CommGroupType.Consecutive else replicas // size, size)
