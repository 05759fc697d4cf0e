"""Draws the pictures of docs/concepts.md; each is computed by polyroute where it shows a number.

    python docs/figures/concepts.py

Every picture has a light and a dark palette, and a background of its own.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from polyroute.config import MHRConfig
from polyroute.layer.granularity import router_of
from polyroute.routes.weights import skill_weights

FOLDER = Path(__file__).parent
STYLE = """
.back{fill:#fff;stroke:#ddd}.text{fill:#222}.soft{fill:#666}.frozen{fill:#e6e6e6;stroke:#999}
.line{stroke:#555;fill:none;stroke-width:1.5}.tip{fill:#555}.gap{stroke:#fff;stroke-width:2}
.trained{stroke:#c4314b;stroke-width:3;fill:none}.hot{fill:#c4314b}
.s0{fill:#d8572a}.s1{fill:#3b7dd8}.s2{fill:#3a9d5d}.s3{fill:#b08a1e}.mean{fill:#8a7a63}
@media (prefers-color-scheme:dark){
.back{fill:#22252b;stroke:#444}.text{fill:#eee}.soft{fill:#aaa}.frozen{fill:#3a3f47;stroke:#888}
.line{stroke:#bbb}.tip{fill:#bbb}.gap{stroke:#22252b}.trained{stroke:#ff7b93}.hot{fill:#ff7b93}
.s0{fill:#e8774f}.s1{fill:#6aa2ee}.s2{fill:#5fbf83}.s3{fill:#d3ab3c}.mean{fill:#b3a48d}}
"""
SKILLS, HEADS = 4, 3


class Picture:
    """An SVG that grows, in drawing order."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="14" aria-label="{label}">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" '
            'orient="auto"><path class="tip" d="M0 0 L6 3 L0 6 z"/></marker></defs>',
            f'<rect class="back" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, style: str) -> None:
        """A rectangle, in one of the styles above."""
        self.parts.append(
            f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'
        )

    def text(
        self, x: float, y: float, text: str, style: str = "text", anchor: str = "middle"
    ) -> None:
        """A line of text, by default centred at x."""
        self.parts.append(
            f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A line with a tip."""
        self.parts.append(
            f'<path class="line" marker-end="url(#tip)" d="M{x:g} {y:g} L{to_x:g} {to_y:g}"/>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A line without."""
        self.parts.append(f'<path class="line" d="M{x:g} {y:g} L{to_x:g} {to_y:g}"/>')

    def skill(
        self, x: float, y: float, style: str, *, heads: int = HEADS, height: int = 34
    ) -> None:
        """A skill at one site: A above B's place, cut into heads."""
        for head in range(heads):
            self.box(x, y + head * height, 26, height - 3, f"{style} gap")

    def shares(self, x: float, y: float, shares: Sequence[float], width: float = 150) -> None:
        """A bar of the shares that the skills have in a mixture."""
        for skill, share in enumerate(shares):
            self.box(x, y, width * share, 26, f"s{skill} gap")
            x += width * share

    def write(self, name: str) -> None:
        """Write the picture beside this script."""
        text = "\n".join([*self.parts, "</svg>\n"])
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def weights(*logits: float) -> list[float]:
    """What polyroute makes of a row of logits, one router and one head."""
    row = torch.tensor(logits, dtype=torch.float).view(1, 1, 1, -1)
    return list(map(float, skill_weights(row, MHRConfig(), training=False).flatten()))


def inventory() -> None:
    """The same skills at every site."""
    picture = Picture(760, 270, "An inventory: the same four skills at every site")
    picture.text(380, 32, "inventory: 4 skills at every site of the frozen base model")
    for place, site in enumerate(["layer 0, q", "layer 0, v", "layer 1, q", "layer 1, v"]):
        x = 30 + 180 * place
        picture.box(x, 60, 160, 40, "frozen")
        picture.text(x + 80, 85, site, "soft")
        for skill in range(SKILLS):
            picture.skill(x + 14 + 36 * skill, 115, f"s{skill}")
        picture.text(x + 80, 236, "A and B of each skill", "soft")
    picture.text(380, 258, "One colour is one skill: a LoRA of rank r over all sites.", "soft")
    picture.write("concept-inventory")


def heads() -> None:
    """One row of weights for a layer, and one for each of its heads."""
    picture = Picture(760, 270, "Poly mixes whole skills, MHR mixes them head by head")
    for x, title, rows in (
        (40, "Poly: one head", [weights(2, -1, 0, -2)]),
        (
            410,
            "MHR: three heads",
            [weights(2, -1, 0, -2), weights(-3, 3, -2, 0), weights(0, -4, 1, 3)],
        ),
    ):
        picture.text(x + 155, 32, title)
        height = 150 / len(rows)
        for head, shares in enumerate(rows):
            y = 60 + head * height
            picture.shares(x, y + height / 2 - 13, shares)
            picture.arrow(x + 160, y + height / 2, x + 215, y + height / 2)
            start = y
            for skill, share in enumerate(shares):
                picture.box(x + 225, start, 70, (height - 4) * share, f"s{skill}")
                start += (height - 4) * share
        picture.text(x + 75, 232, "routing weights", "soft")
        picture.text(x + 260, 232, "shares in its A", "soft")
    picture.text(
        380, 258, "A head is a block of a layer's input and output with weights of its own.", "soft"
    )
    picture.write("concept-heads")


def routers() -> None:
    """Which layers each rule groups."""
    sites = [
        f"encoder.block.{i}.layer.{j}.{m}"
        for i in (0, 1)
        for j, m in ((0, "q"), (0, "v"), (1, "wo"))
    ]
    kinds = ["finegrained", "layerwise", "blockwise", "coderwise"]
    picture = Picture(760, 330, "Granularity: which layers share a router")
    picture.text(380, 30, "granularity: which layers share routing weights")
    for row, site in enumerate(sites):
        picture.text(200, 92 + 36 * row, site.removeprefix("encoder."), "soft", "end")
    for column, kind in enumerate(kinds):
        picture.text(275 + 125 * column, 62, kind)
        found: list[str] = []
        for row, site in enumerate(sites):
            router = router_of(site, kind)
            if router not in found:
                found.append(router)
            style = ("s0", "s1", "s2", "s3", "mean", "frozen")[found.index(router)]
            picture.box(235 + 125 * column, 72 + 36 * row, 80, 30, style)
        unit = "router" if len(found) == 1 else "routers"
        picture.text(275 + 125 * column, 304, f"{len(found)} {unit}", "soft")
    picture.write("concept-routers")


def route() -> None:
    """Rows of logits, what they become, and a batch that uses them."""
    tasks = {
        "mnli": (3, -3, 0, -3),
        "rte": (2, -2, 0, -3),
        "snips": (-3, 2, -3, 1),
        '"mu"': (0, 0, 0, 0),
    }
    picture = Picture(760, 270, "A route is a row of numbers; a batch may hold any mix of rows")
    for x, title in (
        (130, "logits: what is stored"),
        (400, "weights: what they become"),
        (640, "batch"),
    ):
        picture.text(x, 32, title)
    for row, (task, logits) in enumerate(tasks.items()):
        y = 55 + 46 * row
        picture.text(70, y + 18, task, "text", "end")
        picture.text(
            160,
            y + 18,
            "the average" if task == '"mu"' else "&#160; ".join(f"{z:+d}" for z in logits),
            "soft",
        )
        picture.arrow(250, y + 13, 305, y + 13)
        picture.shares(320, y, weights(*logits))
    for row, task in enumerate(["mnli", "snips", "mnli", '"mu"']):
        y = 55 + 46 * row
        target = list(tasks).index(task)
        picture.line(475, 68 + 46 * target, 580, y + 13)
        picture.box(585, y, 110, 26, "frozen")
        picture.text(640, y + 18, task, "text")
    says = "One router and one head are shown; a row has N routers x H heads x K skills numbers."
    picture.text(380, 256, says, "soft")
    picture.write("concept-route")


def phases() -> None:
    """What trains in each phase."""
    picture = Picture(760, 300, "What trains in each phase")
    shapes = (("full", "skills and row"), ("z", "the row alone"), ("mu", "the average, one LoRA"))
    for column, (phase, says) in enumerate(shapes):
        x = 30 + 245 * column
        picture.text(x + 105, 32, f"phase {phase}")
        if phase == "mu":
            for skill in range(SKILLS):
                picture.skill(x + 10 + 22 * skill, 60, f"s{skill}", height=26)
            picture.arrow(x + 108, 97, x + 142, 97)
            picture.skill(x + 155, 60, "mean", height=26)
            picture.box(x + 149, 54, 38, 87, "trained")
            picture.text(x + 105, 175, "no routing is left", "soft")
        else:
            for skill in range(SKILLS):
                picture.skill(x + 35 + 36 * skill, 60, f"s{skill}", height=26)
            picture.shares(x + 30, 160, weights(2, -1, 0, -2))
            picture.box(x + 24, 154, 162, 38, "trained")
            if phase == "full":
                picture.box(x + 24, 54, 162, 87, "trained")
        picture.box(x + 24, 212, 162, 30, "frozen")
        picture.text(x + 105, 232, "base model, frozen", "soft")
        picture.text(x + 105, 264, says, "soft")
    picture.text(380, 288, "Framed: what trains on the new task's examples.", "hot")
    picture.write("concept-phases")


def slots() -> None:
    """Adaptations side by side."""
    picture = Picture(760, 280, "Slots: many adaptations in the same forward passes")
    rows = {
        "boolq, seed 0": ("s0", weights(2, -2, 1, 0)),
        "boolq, seed 1": ("s0", weights(3, 0, 1, -1)),
        "rte, lr 0.1": ("s1", weights(-2, 1, 0, -1)),
        "rte, lr 0.3": ("s1", weights(-3, 3, 0, -2)),
    }
    picture.text(130, 32, "slots: a row and an optimizer each")
    picture.text(420, 32, "one batch")
    picture.text(640, 32, "one frozen base model")
    picture.box(560, 60, 160, 172, "frozen")
    picture.text(640, 150, "forward, backward", "soft")
    for row, (name, (style, shares)) in enumerate(rows.items()):
        y = 60 + 44 * row
        picture.text(150, y + 25, name, "text", "end")
        picture.shares(165, y + 7, shares, 90)
        picture.arrow(262, y + 20, 355, y + 20)
        for example in range(3):
            picture.box(365 + 38 * example, y + 7, 34, 26, f"{style} gap")
        picture.arrow(485, y + 20, 550, y + 20)
    says = "Each gradient goes back to its own slot, which ends where it would end alone."
    picture.text(380, 262, says, "soft")
    picture.write("concept-slots")


PICTURES = (inventory, heads, routers, route, phases, slots)

if __name__ == "__main__":
    for draw in PICTURES:
        draw()
