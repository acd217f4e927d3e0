"""The pictures of docs/parallelism.md: `python docs/images/parallelism_pictures.py` writes them again as SVG."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
INK, MUTED, RULE, WHITE = "#1f2933", "#61707d", "#c3ccd4", "#ffffff"
RANKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""A colour a rank: Okabe and Ito's palette, which colour-blind readers can tell apart."""
PALE = ("#cfe4f2", "#f9dfcc", "#cceee3", "#f5e3ee")


class Picture:
    """Boxes, words and arrows on a white ground."""

    def __init__(self, width: int, height: int, title: str):
        self._size, self._title = (width, height), title
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", *, fill: str = WHITE, edge: str = RULE
    ) -> None:
        """A rectangle with a word in its middle."""
        shape = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{edge}"'
        self._parts.append(f"<rect {shape}/>")
        if text:
            self.text(x + width / 2, y + height / 2 + 4, text, anchor="middle")

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", color: str = INK, bold: bool = False
    ) -> None:
        """A line of words; y is its baseline."""
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}"'
        self._parts.append(f"<text {place}{weight}>{escape(text)}</text>")

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, color: str = MUTED) -> None:
        """A line with a head at its second end."""
        line = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
        self._parts.append(f'<line {line} stroke="{color}" stroke-width="1.4" marker-end="url(#head)"/>')

    def svg(self) -> str:
        """The whole picture."""
        width, height = self._size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'font-family="system-ui, DejaVu Sans, sans-serif" font-size="13" role="img">\n'
            f"<title>{escape(self._title)}</title>\n<defs>{head}</defs>\n"
            f'<rect width="{width}" height="{height}" fill="{WHITE}"/>\n' + "\n".join(self._parts) + "\n</svg>\n"
        )


def tensor() -> Picture:
    """One MLP on two tensor ranks."""
    p = Picture(720, 210, "Tensor parallelism: a layer's weights are cut, every rank works on all tokens")
    p.box(20, 75, 80, 60, "tokens")
    for rank, y in enumerate((25, 125)):
        p.text(130, y - 6, f"rank {rank}", color=RANKS[rank], bold=True)
        p.box(130, y, 150, 50, f"fc1: {'left' if rank == 0 else 'right'} half", fill=PALE[rank], edge=RANKS[rank])
        p.box(330, y, 150, 50, f"fc2: {'upper' if rank == 0 else 'lower'} half", fill=PALE[rank], edge=RANKS[rank])
        p.arrow(100, 105, 128, y + 25)
        p.arrow(280, y + 25, 328, y + 25)
        p.arrow(480, y + 25, 538, 95 + 20 * rank)
    p.box(540, 75, 60, 60, "sum")
    p.arrow(600, 105, 638, 105)
    p.box(640, 75, 70, 60, "tokens")
    p.text(300, 200, "GELU needs no exchange; the sum is one all-reduce", color=MUTED, anchor="middle")
    return p


def pipeline() -> Picture:
    """Four micro-batches through four stages, forward only."""
    p = Picture(720, 200, "Pipeline parallelism: each rank has some of the blocks, micro-batches pass through")
    _timeline(p, [[(stage + i, str(i + 1)) for i in range(4)] for stage in range(4)], columns=7, y=30)
    for stage in range(4):
        p.text(20, 51 + 34 * stage, f"stage {stage}", color=RANKS[stage], bold=True)
    p.text(400, 186, "time →, 1 to 4: micro-batches, empty: the bubble", color=MUTED, anchor="middle")
    return p


def _timeline(p: Picture, rows: Sequence[Sequence[tuple[int, str]]], *, columns: int, y: int) -> None:
    """rows: of each rank, (column, word) of what it does."""
    width = 610 / columns
    for rank, row in enumerate(rows):
        p.box(90, y + 34 * rank, 610, 30, fill="#f3f5f7")
        for column, word in row:
            p.box(90 + width * column, y + 34 * rank, width, 30, word, fill=PALE[rank], edge=RANKS[rank])


def data() -> Picture:
    """Two replicas with their halves of a batch."""
    p = Picture(720, 210, "Data parallelism: copies of the model share a batch, gradients are summed")
    for rank, y in enumerate((25, 125)):
        p.text(20, y - 6, f"replica {rank}", color=RANKS[rank], bold=True)
        p.box(20, y, 120, 50, f"pairs {'1 to 4' if rank == 0 else '5 to 8'}", fill=PALE[rank], edge=RANKS[rank])
        p.box(190, y, 140, 50, "whole model", fill=PALE[rank], edge=RANKS[rank])
        p.box(560, y, 140, 50, f"updates half {rank + 1}", fill=PALE[rank], edge=RANKS[rank])
        p.arrow(140, y + 25, 188, y + 25)
        p.arrow(330, y + 25, 388, 90 + 25 * rank)
        p.arrow(510, 90 + 25 * rank, 558, y + 25)
    p.box(390, 75, 120, 60, "sum of gradients")
    p.text(630, 105, "then they swap halves", color=MUTED, anchor="middle")
    p.text(265, 105, "loss over all 8", color=MUTED, anchor="middle")
    return p


def stash() -> Picture:
    """What a stage keeps of its micro-batches in the encode phase."""
    p = Picture(720, 215, "The stash: of every micro-batch a stage keeps its input and forgets the rest")
    for i in range(4):
        x = 40 + 165 * i
        p.text(x, 20, f"micro-batch {i + 1}", bold=True)
        p.box(x, 30, 130, 34, "stage input", fill=PALE[0], edge=RANKS[0])
        for block in range(3):
            p.box(x, 72 + 26 * block, 130, 22, f"activations {block + 1}", fill="#f3f5f7")
        p.text(x + 65, 170, "→ embeddings", anchor="middle", color=MUTED)
    p.text(360, 202, "blue is kept (the stash); grey is computed and dropped at once", anchor="middle", color=MUTED)
    return p


def replay() -> Picture:
    """One rank's step: encode, loss, then replay and backward."""
    p = Picture(720, 140, "The replay: a stage runs again from its stash, with gradients, last micro-batch first")
    unit, x = 28.0, 20.0
    plan = [*((f"F{i}", 1, PALE[0], RANKS[0]) for i in range(1, 5)), ("loss", 2.2, PALE[2], RANKS[2])]
    for i in range(4, 0, -1):
        plan += [(f"R{i}", 1, "#eef4f9", RANKS[0]), (f"B{i}", 2, PALE[1], RANKS[1])]
    for word, units, fill, edge in plan:
        p.box(x, 40, unit * units, 40, word, fill=fill, edge=edge)
        x += unit * units
    p.text(20, 28, "encode (no gradients)", color=RANKS[0], bold=True)
    p.text(196, 28, "all pairs", color=RANKS[2], bold=True)
    p.text(270, 28, "backprop", color=RANKS[1], bold=True)
    p.text(20, 105, "F: forward, keeps its input; R: the same forward again, keeps activations;", color=MUTED)
    p.text(20, 125, "B: backward, frees them. 4 F of compute instead of 3 F", color=MUTED)
    return p


PICTURES = {"tensor": tensor, "pipeline": pipeline, "data": data, "stash": stash, "replay": replay}


def main() -> None:
    """Write all of them."""
    for name, picture in PICTURES.items():
        (FOLDER / f"parallel_{name}.svg").write_text(picture().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
