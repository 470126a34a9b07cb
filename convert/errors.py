"""The one error of a conversion, and a list that collects faults so that a reader meets all of them at once."""

from collections.abc import Mapping, Sequence

SHOWN = 10  # of each kind: a wrong config.json misshapes every layer alike, and ten lines say so as well as a thousand


class ConversionError(ValueError):
    """A checkpoint that cannot be read, or does not fit its model: what was expected, what came, what to do.

    Where many faults were found together, `faults` holds every one of them by kind; the message shows the first ten.
    """

    def __init__(self, message: str, faults: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(message)
        self.faults = dict(faults or {})


class Faults:
    """Faults by kind, raised together."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, fault: str) -> None:
        self._by_kind.setdefault(kind, []).append(fault)

    def raise_any(self, headline: str) -> None:
        """Raises a ConversionError of everything added; returns where nothing was."""
        if not self._by_kind:
            return
        lines = [headline]
        for kind, faults in self._by_kind.items():
            lines.append(f"{kind}:")
            lines += [f"  {fault}" for fault in faults[:SHOWN]]
            if len(faults) > SHOWN:
                lines.append(f"  and {len(faults) - SHOWN} more")
        raise ConversionError("\n".join(lines), self._by_kind)
