"""Pack the demo's pairs: emoji drawings by three teams, with their names, groups and keywords.

    python -m tools.demo_assets.pack

Downloads four npm packages (needs npm and network access) and writes WebDataset shards and the
packages' licence texts to `fasterase/demo/data`. The same versions of the packages and of Pillow
give the same bytes: sorted keys, fixed times and owners.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from pathlib import Path

from PIL import Image

from benchmarks.command import new_parser
from fasterase.demo.emoji import DATA, DEFAULT_FORGET, EmojiInfo
from fasterase.files import replace_file

SIZE = 64
SAMPLES_PER_SHARD = 512
# Groups of things. The others (people, flags, symbols, components) are mostly skin tones, families,
# letters and near-copies of one drawing.
GROUPS = (
    "smileys-emotion",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
)
# The versions that ATTRIBUTION.md states.
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "names": "emojibase-data@17.0.0",
}
# Only these two packages contain a licence text; the other texts are already in the folder.
LICENSES = {"noto": "emoji-datasource-MIT.txt", "names": "emojibase-data-MIT.txt"}
FOLDERS = {"noto": "img/google/64", "twemoji": "img/twitter/64", "fluent": "assets"}
NON_MEMBER_SHARE = 0.1
NON_MEMBER_SEED = 0


def fetch(work: Path) -> dict[str, Path]:
    """Download and unpack every npm package, and return the folder of each."""
    folders = {}
    for role, package in PACKAGES.items():
        done = subprocess.run(
            ["npm", "pack", "--json", package], cwd=work, check=True, capture_output=True, text=True
        )
        answer = json.loads(done.stdout)[0]
        # npm before 9 reports a scoped package as @scope/name but writes scope-name.
        archive = work / answer["filename"].replace("@", "").replace("/", "-")
        folders[role] = work / role
        with tarfile.open(archive) as packed:
            packed.extractall(folders[role], filter="data")
        folders[role] = folders[role] / "package"
    return folders


def find_drawing(folder: Path, hexcode: str) -> Path | None:
    """Find the drawing of a code point sequence; teams differ on the variation selector fe0f."""
    code = hexcode.lower()
    for spelling in (code, code.replace("-fe0f", ""), f"{code}-fe0f"):
        for ending in (".png", ".webp"):
            path = folder / f"{spelling}{ending}"
            if path.is_file():
                return path
    return None


def encode(path: Path) -> bytes:
    """Return a drawing as a 64 x 64 palette PNG on white."""
    drawing = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    small = canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    # 64 colours keep the shards below 13 MB; at 64 pixels the difference is invisible.
    palette = small.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def slug(name: str) -> str:
    """Turn a name into a WebDataset key: lower-case ASCII without dots."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")


def read_concepts(folders: dict[str, Path]) -> list[EmojiInfo]:
    """Return the concepts of `GROUPS` that all three teams drew, in the order of their keys.

    Skin-tone variants have no entries of their own in emojibase, so none is included.
    """
    names = folders["names"]
    entries = json.loads((names / "en/data.json").read_text(encoding="utf-8"))
    levels = json.loads((names / "meta/groups.json").read_text(encoding="utf-8"))
    concepts: list[EmojiInfo] = []
    for entry in entries:
        group = levels["groups"].get(str(entry.get("group")))
        drawn = all(
            find_drawing(folders[team] / FOLDERS[team], entry["hexcode"]) for team in FOLDERS
        )
        if group in GROUPS and drawn:
            concepts.append(
                EmojiInfo(
                    concept=entry["label"],
                    group=group,
                    subgroup=levels["subgroups"][str(entry["subgroup"])],
                    keywords=entry["tags"],
                    team="",
                    hexcode=entry["hexcode"],
                    member=True,
                )
            )
    concepts.sort(key=lambda concept: slug(concept["concept"]))
    assert len({slug(concept["concept"]) for concept in concepts}) == len(concepts)
    return concepts


def mark_non_members(concepts: list[EmojiInfo]) -> None:
    """Mark a tenth of the concepts as non-members, spread evenly over the subgroups.

    The concept that the demo erases by default has none: the base model must know all of it.
    """
    draw = random.Random(NON_MEMBER_SEED)
    by_subgroup = defaultdict(list)
    for concept in concepts:
        if concept["subgroup"] != DEFAULT_FORGET:
            by_subgroup[concept["subgroup"]].append(concept)
    ordered = []
    for subgroup in sorted(by_subgroup):
        draw.shuffle(by_subgroup[subgroup])
        ordered += by_subgroup[subgroup]
    # Every tenth in subgroup order, so a subgroup of n gives n/10, rounded up or down.
    count = round(NON_MEMBER_SHARE * len(concepts))
    for rank in range(count):
        ordered[int((rank + 0.5) * len(ordered) / count)]["member"] = False


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file whose header depends only on its name and size."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    archive.addfile(header, io.BytesIO(content))


def write_shards(concepts: list[EmojiInfo], team: str, folder: Path, output: Path) -> None:
    """Write one team's samples in order; their keys are the concepts' slugs."""
    for number, start in enumerate(range(0, len(concepts), SAMPLES_PER_SHARD)):
        target = output / f"{team}-{number:03d}.tar"
        with (
            replace_file(target) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for concept in concepts[start : start + SAMPLES_PER_SHARD]:
                path = find_drawing(folder, concept["hexcode"])
                assert path is not None
                key = slug(concept["concept"])
                record = json.dumps({**concept, "team": team}, ensure_ascii=False)
                add_file(archive, f"{key}.png", encode(path))
                add_file(archive, f"{key}.txt", concept["concept"].encode())
                add_file(archive, f"{key}.json", record.encode())


def main(arguments: list[str] | None = None) -> None:
    """Download, select, encode and write everything to the output folder."""
    parser = new_parser(__doc__)
    parser.add_argument("--output", type=Path, default=DATA, help="folder for the shards")
    output = parser.parse_args(arguments).output
    (output / "licenses").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        folders = fetch(Path(work))
        concepts = read_concepts(folders)
        mark_non_members(concepts)
        for team, inside in FOLDERS.items():
            write_shards(concepts, team, folders[team] / inside, output)
        for role, name in LICENSES.items():
            shutil.copyfile(folders[role] / "LICENSE", output / "licenses" / name)
    members = sum(concept["member"] for concept in concepts)
    print(f"{len(concepts)} concepts, {members} members, in {output}")


if __name__ == "__main__":
    main()
