"""Write what is generated from the settings' model: `python -m ckptd.origins reference|example`, in the repository."""

import sys

from ckptd.origins.render import EXAMPLE, REFERENCE, render_example, render_reference

_TEXTS = {"reference": (REFERENCE, render_reference), "example": (EXAMPLE, render_example)}


def main(names: list[str]) -> int:
    """Write the named texts; exit status 2 when a name is unknown or none is given."""
    if not names or set(names) - _TEXTS.keys():
        sys.stderr.write(f"usage: python -m ckptd.origins {'|'.join(_TEXTS)} ...\n")
        return 2
    for name in names:
        path, render = _TEXTS[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(), encoding="utf-8")
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
