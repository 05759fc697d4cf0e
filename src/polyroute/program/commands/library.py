"""`polyroute library`, `merge` and `recompress`: arithmetic of LoRAs that exist."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from polyroute.errors import InputError
from polyroute.exchange.peft_folder import folders_inside
from polyroute.host.files import make_folder
from polyroute.host.output import Result
from polyroute.host.paths import expanded
from polyroute.library.delta import Delta
from polyroute.library.library import Library
from polyroute.program.options.library import LibraryOptions, MergeOptions, RecompressOptions
from polyroute.saved.peft_export import CONFIG

__all__ = ["library_table", "merge_loras", "recompress_lora"]


def library_table(options: LibraryOptions) -> Result:
    """What LoRAs are, how alike they are, and which cannot be used.

    Raises:
        InputError: no LoRA can be used.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* left out")  # the result names all of them
        library = Library.from_peft(_named(options.loras), allow_pickle=options.allow_pickle)
    rows = library.table()
    table = Table("name", "layers", "rank", "norm", "nearest", "cosine")
    for row in rows:
        if "refused" in row:
            continue
        alike = (escape(row["nearest"]), f"{row['cosine']:.3f}") if "nearest" in row else ("", "")
        table.add_row(
            escape(row["name"]), str(row["layers"]), str(row["rank"]), f"{row['norm']:.4g}", *alike
        )
    refused = [f"left out: {name}, because {why}" for name, why in library.refused.items()]
    return Result({"loras": rows}, (table, *refused))


def merge_loras(options: MergeOptions) -> Result:
    """Merge LoRAs and write the result.

    Raises:
        InputError: no LoRA can be used, an option cannot, or the folder cannot be written.
    """
    places = _named(options.loras)
    library = Library.from_peft(places, allow_pickle=options.allow_pickle)
    _check_out(options.out, places.values())
    merged = library.merge(
        options.method, weights=options.weight, rank=options.size.rank,
        energy=options.size.energy, **options.options_of_method(),
    )  # fmt: skip
    taking_part = list(options.weight if isinstance(options.weight, dict) else library)
    about = {"method": options.method, "loras": taking_part, "refused": library.refused}
    return _written(merged, options.out, about, f"merged {len(taking_part)} LoRAs")


def recompress_lora(options: RecompressOptions) -> Result:
    """Write a LoRA of smaller rank.

    Raises:
        InputError: the LoRA cannot be used, or the folder cannot be written.
    """
    delta = Delta.from_peft(options.lora, allow_pickle=options.allow_pickle)
    _check_out(options.out, [options.lora])
    small = delta.recompress(rank=options.size.rank, energy=options.size.energy)
    before = max(delta.ranks.values())
    return _written(small, options.out, {"lora": options.lora}, f"had rank {before}")


def _named(loras: Iterable[str]) -> dict[str, str]:
    """Each LoRA by its name, that of its folder unless `name=` stands before it.

    A folder without a LoRA of its own stands for those in its sub-folders.

    Raises:
        InputError: two have one name.
    """
    found: dict[str, str] = {}
    for text in loras:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = "", text
        for own, folder in _inside(name, place):
            if own in found:
                raise InputError(
                    f"{found[own]} and {folder} both have the name {own!r}; give one another: "
                    f"NAME={folder}"
                )
            found[own] = folder
    return found


def _inside(name: str, place: str) -> list[tuple[str, str]]:
    path = expanded(place)
    inside = folders_inside(path)
    if (path / CONFIG).is_file() or not inside:
        if not path.exists():
            return [(name or place, place)]  # an id on the hub
        return [(name or path.resolve().name, str(path))]
    start = f"{name}/" if name else ""
    return [(start + each.relative_to(path).as_posix(), str(each)) for each in inside]


def _written(delta: Delta, out: Path, about: Mapping[str, object], first: str) -> Result:
    delta.save_peft(out)
    rank, norm = max(delta.ranks.values()), delta.norm()
    numbers = {"layers": len(delta.layers), "rank": rank, "norm": norm, "error": delta.error}
    exact = "exact" if not delta.error else f"at most {delta.error:.3g} from the exact update"
    shown = f"{first}; rank {rank}, norm {norm:.4g}, {exact}; the LoRA is in {out}"
    return Result({"out": out, **about, **numbers}, (shown,))


def _check_out(out: Path, sources: Iterable[str]) -> None:
    """Make sure, before anything is computed, that the folder can be written and is no source."""
    for source in sources:
        place = expanded(source).resolve()
        if place.exists() and out.resolve() in (place, *place.parents):
            raise InputError(
                f"--out {out} is, or contains, one of the LoRAs that are read; name another folder"
            )
    make_folder(out)
