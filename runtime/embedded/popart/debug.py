"""DebugContext and DebugInfo: a name for what is being built. Methods take one wherever they take a str."""


class DebugContext:
    """`DebugContext("name")`, `DebugContext(debugInfo, "name")`, `DebugContext()`."""

    def __init__(self, *args, name=None):
        texts = [value for value in args if isinstance(value, str)]
        parents = [value for value in args if isinstance(value, (DebugContext, DebugInfo))]
        if len(texts) + len(parents) != len(args) or len(texts) > 1 or len(parents) > 1:
            raise TypeError(f"DebugContext(): incompatible constructor arguments {args}")
        own = texts[0] if texts else (name or "")
        above = parents[0].getPathName() if parents else ""
        self.name = own
        self._path = "/".join(part for part in (above, own) if part)

    def getPathName(self):
        """The names from the outermost to this one, joined by `/`."""
        return self._path

    def __str__(self):
        return self.name

    def __repr__(self):
        return f'DebugContext("{self.name}")'


class DebugInfo:
    """`DebugInfo(debugContext, layer)`: what a layer of a program builds under a context, with free key-value pairs."""

    def __init__(self, debugContext, layer):
        self._context = debugContext if isinstance(debugContext, DebugContext) else DebugContext(debugContext)
        self.layer, self.values = str(layer), {}

    @property
    def name(self):
        return self._context.name

    def getPathName(self):
        return self._context.getPathName()

    def setValue(self, name, value):
        """Keeps a text under a name; True when it is new."""
        new = name not in self.values
        self.values[name] = str(value)
        return new
