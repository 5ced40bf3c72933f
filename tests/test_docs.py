"""Every code block of the README and of docs/ is run, in order, in one folder per page."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import importlib.resources
import importlib.util
import io
import json
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fasterase
from fasterase.cli import main
from fasterase.cli.parser import parse
from tests import small_models

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DEMO = ROOT / "fasterase/demo"
# Exit codes: done, and done but remembered, as the tiny model ends.
DONE = (0, 4)
# Blocks that run, and those that show what is no code. `math` is drawn when the site is built.
RUN, SHOWN = {"python", "sh", "bash"}, {"", "bibtex", "math", "text"}
WORDS = ("apple", "apples", "dog", "cat", "house", "tree", "boat", "plane", "chair", "lamp")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        *("ignore:verdict", "ignore:retain. .* captions seem to name", "ignore:.*quick_gelu"),
        *("ignore:retain. .* pictures look like", "ignore:find "),
        "ignore:the delta takes",
    ),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the pages name, a ViT-B-32 of their tag that is tiny, and a
    demo of few drawings."""
    from open_clip import factory

    monkeypatch.chdir(tmp_path)
    rows = []
    for i in range(20):
        Image.new("RGB", (40, 40), (12 * i, 255 - 12 * i, 99)).save(f"{i}.png")
        rows.append(f"{i}.png\ta photo of {WORDS[i % len(WORDS)]} number {i}")
    sets = {"pairs": rows, "forget": rows[:4], "retain": rows[4:], "non_members": rows[:9]}
    sets |= {"octopus": rows[:2], "santa": rows[2:4]}
    for name, chosen in sets.items():
        Path(f"{name}.csv").write_text("\n".join(["filepath\ttitle", *chosen]))
    write_shards(rows, "shards/00{}.tar")
    for team in ("noto", "fluent", "twemoji"):
        assert (DEMO / f"data/{team}-001.tar").is_file()
        write_shards(rows, f"demo/data/{team}-00{{}}.tar")
    Path("demo/models").symlink_to(DEMO / "models")
    files, demo = importlib.resources.files, tmp_path / "demo"
    monkeypatch.setattr(
        importlib.resources,
        "files",
        lambda package: demo if package == "fasterase.demo" else files(package),
    )
    config = small_models.open_clip_config(context_length=77)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", config)
    torch.manual_seed(0)  # which pairs are found depends on the weights
    weights = open_clip.CLIP(**config).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: path)
    # The tiny model knows nothing to forget, and would use up the budget of an automatic run.
    monkeypatch.setattr("fasterase.engine.job.MAX_STEPS", 4)
    monkeypatch.setattr("fasterase.evaluation.attacks.weights.STEPS", 1)
    return tmp_path


def write_shards(rows: list[str], pattern: str) -> None:
    """Write the pairs as two shards too."""
    for shard in range(2):
        path = Path(pattern.format(shard))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for row in rows[shard::2]:
                name, text = row.split("\t")
                tar.add(name)
                caption = tarfile.TarInfo(name.replace(".png", ".txt"))
                caption.size = len(text)
                tar.addfile(caption, io.BytesIO(text.encode()))


def taken_for_granted() -> dict[str, object]:
    """Names that the pages use without saying where they come from."""
    import transformers

    pixels, tokens = small_models.random_pairs()
    model = small_models.open_clip_vit()
    generator = torch.Generator().manual_seed(0)
    image, text, ref_image, ref_text = torch.nn.functional.normalize(
        torch.randn(4, 100, 16, generator=generator), dim=-1
    )
    return {
        "fasterase": fasterase,
        "open_clip": open_clip,
        "transformers": transformers,
        "images": [Image.new("RGB", (40, 40), (200, i, 0)) for i in range(3)],
        "forget": "forget.csv",
        "retain": "retain.csv",
        "loader": [(pixels, tokens)],
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
        "image": image.requires_grad_(),
        "text": text.requires_grad_(),
        "scale": torch.tensor(10.0),
        "ref_image": ref_image,
        "ref_text": ref_text,
        "ref_scale": torch.tensor(10.0),
    }


def test_python_blocks_of_the_readme(workplace, capsys):
    for block in blocks(ROOT / "README.md", "python"):
        # Each block stands for itself; what one of them trains must not break the next.
        exec(compile(block, "README.md", "exec"), taken_for_granted())
    assert "forget (" in capsys.readouterr().out
    open_clip.create_model_and_transforms("local-dir:erased")


def test_python_blocks_of_the_docs(workplace):
    fasterase.unlearn("ViT-B-32/laion2b_s34b_b79k", "forget.csv", "retain.csv", max_steps=1).save(
        "erased"
    )
    for page in PAGES[1:]:
        names = taken_for_granted()
        for block in blocks(page, "python"):
            if "transformers." in block:
                continue
            exec(compile(block, page.name, "exec"), names)


def test_what_is_saved_loads_as_the_docs_say_of_transformers(workplace):
    (block,) = (b for b in blocks(ROOT / "docs/formats.md", "python") if "transformers." in b)
    pixels, ids = small_models.random_pairs(count=12)
    pairs = list(zip(pixels, ids, strict=True))
    result = fasterase.unlearn(small_models.hf_clip(), pairs[:4], pairs[4:], max_steps=1)
    result.save("erased")
    exec(compile(block, "inputs.md", "exec"), taken_for_granted())


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, without comments and with continued lines joined.

    Of scripts (`bash`) those that run fasterase.
    """
    scripts = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    ours = [line for line in scripts if " fasterase " in line]
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines + ours if (words := shlex.split(line, comments=True))]


def test_every_block_is_of_a_kind_that_is_run_or_shown():
    for page in PAGES:
        opened = re.findall(r"^ *(```|~~~)(.*)$", page.read_text(encoding="utf-8"), re.M)[::2]
        kinds = {kind for _, kind in opened}
        assert kinds <= RUN | SHOWN, page
        assert {mark for mark, _ in opened} <= {"```"}, page
        for kind in kinds & RUN:
            assert len(blocks(page, kind)) == [k for _, k in opened].count(kind), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks(workplace, page):
    for words in commands(page):
        if words[0] == "fasterase":
            run(words[1:])
        elif {"torchrun", "deepspeed"} & {*words}:
            Path("erase.yaml").touch()
            parse(words[words.index("fasterase") + 1 :])
        elif words[0] == "make":
            # What it does takes minutes: demo and tests have tests of their own.
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True)
            assert done.returncode == 0, done.stderr
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
        else:
            installed = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
            assert words[:2] == ["pip", "install"]
            assert installed is not None, words
            extras = importlib.metadata.metadata("fasterase").get_all("Provides-Extra")
            assert installed[1] in (None, *extras), words


def run(arguments: list[str]) -> None:
    target = arguments.index(">") if ">" in arguments else None
    if arguments[0] in ("demo", "plan"):  # what they print has tests of its own
        parse(arguments)
    elif target is None:
        assert main(arguments) in DONE, arguments
    else:
        with Path(arguments[target + 1]).open("w") as file, contextlib.redirect_stdout(file):
            assert main(arguments[:target]) in DONE, arguments


def test_every_relative_link_leads_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def evidence(column: str, form: str) -> list[str]:
    """A column of the evidence for the models of the README's table, in percent."""
    with (ROOT / "benchmarks/results/evidence.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    models = ("original", "fasterase", "CLIPErase", "retrained")
    return [format(100 * float(rows[model][column]), form) for model in models]


def loss_with_kl(provider: str, metric: str, pairs: int) -> float:
    with (ROOT / "benchmarks/results/contrastive_cpu.csv").open() as file:
        (row,) = (
            row
            for row in csv.DictReader(file)
            if (row["kernel_provider"], row["metric_name"], row["x_value"])
            == (provider, metric, str(pairs))
            and row["kernel_operation_mode"] == "full"
            and (extra := json.loads(row["extra_benchmark_config_str"]))["kl"]
            and extra["D"] == 512
            and not extra["labels"]
        )
    return float(row["y_value_50"])


def test_numbers_of_the_first_screen_are_in_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([a-z].*?)\|(.*)\|$", readme, re.M)
    found = {name.split()[0]: [cell.strip(" *") for cell in row.split("|")] for name, row in table}
    assert found["trained"] == evidence("forget residue", ".0f")
    unseen = next(row.split("|") for name, row in table if "never trained on" in name)
    assert [cell.strip(" *") for cell in unseen] == evidence("forget-unseen hit@1", ".1f")
    for tower, figure in (
        ("image", "its images, original's texts"),
        ("text", "its texts, original's images"),
    ):
        row = next(row.split("|") for name, row in table if f"its {tower} tower" in name)
        assert [cell.strip(" *") for cell in row] == evidence(f"{figure}: hit@1", ".0f")
    for name, of_set in (
        ("held-out", "holdout"),
        ("neighbours:", "neighbour"),
        ("retained", "retain"),
    ):
        assert found[name] == ["", *evidence(f"{of_set} change", ".1f")[1:]]
    flowing = " ".join(readme.split())
    own, theirs = (loss_with_kl(x, "memory", 8192) for x in ("fasterase-cpu", "open_clip"))
    assert f"with KL takes {own:,.0f} MiB instead of open_clip's {theirs:,.0f} MiB" in flowing
    ratios = [
        f"{loss_with_kl(x, 'speed', n) / loss_with_kl('fasterase-cpu', 'speed', n):.2f} times"
        for n in (4096, 64)
        for x in ("open_clip", "torch-dense")
    ]
    assert f"at 4,096 pairs it is {ratios[0]} as fast as open_clip and {ratios[1]} as" in flowing
    assert f"at 64 pairs {ratios[2].split()[0]} and {ratios[3]}." in flowing
