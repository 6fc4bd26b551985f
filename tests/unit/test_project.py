"""The project holds to its own rules: floors, README and docs, what may be committed, what an import does.

python tests/unit/test_project.py      brings the tables of docs/options.md and docs/families.md up to date
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers

from accel_moe import supported
from accel_moe.config import TABLE_BEGIN, TABLE_END, option_names, options_table

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
RESULTS = REPOSITORY / "examples" / "benchmarks" / "RESULTS.md"
DOCS = REPOSITORY / "docs"
ARCHITECTURE, OPTIONS, FAMILIES = DOCS / "architecture.md", DOCS / "options.md", DOCS / "families.md"
PAGES = (README, CONTRIBUTING, *sorted(DOCS.glob("*.md")), RESULTS, RESULTS.with_name("SCALING.md"))
TREE_BEGIN, TREE_END = "<!-- tree:begin -->", "<!-- tree:end -->"
FAMILIES_BEGIN, FAMILIES_END = "<!-- families:begin -->", "<!-- families:end -->"
TEST_COMMAND = 'python -m pip install -e ".[test]" && python -m pytest'


def between(begin, end, page):
    return page.read_text().split(begin)[1].split(end)[0].strip("\n")


def committed_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [path for path in listed.stdout.split("\0") if path]
    return [path for path in paths if (REPOSITORY / path).is_file()]


def tree_paths():
    """(path, sentence) of each line of docs/architecture.md's tree: two spaces of indent a folder."""
    paths, folders = [], []
    for line in between(TREE_BEGIN, TREE_END, ARCHITECTURE).strip("`\n").splitlines():
        indent, name, sentence = re.match(r"^( *)(\S+) *(.*)$", line).groups()
        del folders[len(indent) // 2 :]
        paths.append(("".join(folders) + name, sentence))
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_file_tree_has_every_file_of_the_package_and_nothing_else():
    in_tree = {path for path, _ in tree_paths()}
    shown = ("accel_moe/", "accelerate_configs/", "examples/")
    files = {path for path in committed_files() if path.startswith(shown)}
    files -= {
        path
        for path in files
        if path.endswith(("/__init__.py", "py.typed", ".png")) and path != "accel_moe/__init__.py"
    }
    missing = sorted(files - in_tree)
    gone = sorted(path for path in in_tree if not (REPOSITORY / path).exists())
    assert not missing and not gone, f"docs/architecture.md lacks {missing}, and has {gone}, which do not exist"


def test_the_file_tree_has_a_sentence_for_every_file():
    assert not [path for path, sentence in tree_paths() if not sentence and not path.endswith("/")]


def test_the_table_of_options_is_the_one_of_the_code():
    table = between(TABLE_BEGIN, TABLE_END, OPTIONS)
    assert table == options_table(), "run `python tests/unit/test_project.py`"
    assert not [name for name in option_names() if f"| `{name}` |" not in table]


def families_table():
    command = [sys.executable, "-m", "accel_moe.families", "--markdown"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_table_of_families_is_what_the_command_prints():
    table = between(FAMILIES_BEGIN, FAMILIES_END, FAMILIES)
    if f"transformers {transformers.__version__}:" not in table:
        pytest.skip(f"the page's table is of another transformers than {transformers.__version__}")
    assert table == families_table(), "run `python tests/unit/test_project.py`"


def test_readme_counts_families_as_the_table_does():
    counted = r"transformers (\d+\.\d+)\.\d+: (\d+) families with experts, (\d+) supported .*, (\d+) refused"
    version, found, works, refused = re.search(counted, between(FAMILIES_BEGIN, FAMILIES_END, FAMILIES)).groups()
    row = f"| models | {works} of the {found} Mixture-of-Experts families of transformers {version}, "
    assert row in README.read_text() and f"the other {refused} are refused" in README.read_text()


def test_readme_reads_in_five_minutes():
    lines, size = len(README.read_text().splitlines()), README.stat().st_size
    assert lines <= 150 and size <= 10_000, f"README.md has {lines} lines and {size} bytes; 150 and 10,000 are allowed"


def test_readme_measures_against_peers_with_the_newest_transformers_and_copies_results():
    measured = README.read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    section = RESULTS.read_text().split("\n## Experts layer\n")[1].split("\n### ")[0]
    rows = [line for line in measured.splitlines() if re.match(r"\| [a-z0-9.-]+ \| ", line)]
    assert rows == [line for line in section.splitlines() if re.match(r"\| [a-z0-9.-]+ \| ", line)] and len(rows) >= 5
    newest = next(row.newest for row in supported.VERSIONS if row.name == "transformers")
    with_what = rf"NVIDIA H100 80GB HBM3, torch \S+, triton \S+, transformers {re.escape(newest)}\.\d+"
    found = [re.search(with_what, " ".join(text.split())) for text in (measured, section)]
    assert all(found) and found[0][0] == found[1][0]


def anchors_of(page):
    """As GitHub makes them of the headings: lower case, no punctuation, hyphens for spaces."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors_of(target))):
            broken.append(link)
    assert not broken


def commands_of(page):
    """(path of the script or module, [flags]) of each command of ours on a page, in a block or in a line of text."""
    text = page.read_text().replace("\\\n", " ")
    program = r"python -m (?P<module>accel_moe(?:\.\w+)+)|(?P<script>(?:examples|tests)/[\w/]+\.py)"
    for found in re.finditer(rf"(?:{program})(?P<arguments>[^`\n]*)", text):
        path = found["script"] or found["module"].replace(".", "/") + ".py"
        yield path, re.findall(r"(?<!\S)--[a-z][a-z_-]*", found["arguments"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_script_and_config_that_a_page_names_exists(page):
    named = re.findall(r"(?:examples|accelerate_configs)/[\w/]+\.(?:py|sh|yaml)", page.read_text())
    assert not [path for path in named if not (REPOSITORY / path).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_flags(page):
    wrong = []
    for path, flags in commands_of(page):
        if not (REPOSITORY / path).is_file():
            wrong.append(path)
            continue
        beside = (REPOSITORY / path).parent.glob("*.py") if path.startswith("examples/") else [REPOSITORY / path]
        known = "".join(file.read_text() for file in beside)
        wrong += [f"{path} {flag}" for flag in flags if f'"{flag}"' not in known]
    assert not wrong


def test_contributing_names_every_marker_of_the_tests():
    markers = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    text = CONTRIBUTING.read_text()
    assert not [marker for marker in markers if f"| `{marker.split(':')[0]}` |" not in text]


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    readme = README.read_text()
    assert "\npython -m pip install -e . && python examples/quickstart.py\n" in readme
    assert f"\n{TEST_COMMAND}\n" in readme
    pattern = re.search(r"grep -m 1 '(.*)' README.md", (REPOSITORY / ".ci" / "run").read_text())[1]
    assert re.findall(pattern, readme, re.MULTILINE) == [TEST_COMMAND]


def test_the_floors_of_pyproject_are_the_supported_ones_and_nothing_shuts_out_a_version_to_come():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = [re.match(r"[\w-]+[^;]*", line)[0].strip() for line in project["dependencies"]]
    for row in supported.VERSIONS:
        if row.name == "python":
            assert project["requires-python"] == f">={row.oldest}"
        else:
            assert (f"{row.name}>={row.oldest}" if row.oldest else row.name) in asked
    assert not [line for line in asked if "<" in line or "==" in line]


def test_readme_says_which_versions_are_supported_and_tested():
    of = {row.name: row for row in supported.VERSIONS}
    readme = README.read_text()
    row = f"| versions | accelerate {of['accelerate']}, transformers {of['transformers']}, torch {of['torch']}"
    assert row in readme
    assert f"Python {of['python']}" in readme


def test_every_import_goes_down_the_floors():
    pytest.importorskip("importlinter", reason="the test extra installs import-linter")
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_stands_on_a_floor():
    contract = (REPOSITORY / "pyproject.toml").read_text().split("layers = [")[1].split("]")[0]
    on_a_floor = set(re.findall(r"accel_moe\.(\w+)", contract))
    inside = [path.removeprefix("accel_moe/") for path in committed_files() if path.startswith("accel_moe/")]
    modules = {path.split("/")[0].removesuffix(".py") for path in inside if path.endswith(".py")} - {"__init__"}
    assert modules <= on_a_floor, f"{modules - on_a_floor} stand on no floor of pyproject.toml's contract"


def test_nothing_committed_names_a_machine():
    # in pieces, so that this file does not name them either
    places = ["/" + "root/", "/" + "Users/", "/" + "work/", "/" + "opt/"]
    hosts = ["pypi" + r"\.org", "python" + r"hosted\.", "--index" + "-url", "--find" + "-links"]
    forbidden = re.compile("|".join([rf"(?<![\w.]){place}" for place in places] + hosts))
    found = []
    for path in committed_files():
        try:
            text = (REPOSITORY / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}: {line.strip()[:100]}" for line in text.splitlines() if forbidden.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.core
def test_importing_the_package_needs_no_triton_touches_no_gpu_and_patches_nothing():
    probe = """
import sys
sys.modules["triton"] = None  # as on a machine that has none
import accel_moe
import torch
from accel_moe import hooks
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "accel_moe.kernels.launch" not in sys.modules
assert not torch.cuda.is_initialized()
assert not hooks.installed(), hooks.installed()
assert "scattermoe" in ALL_EXPERTS_FUNCTIONS.valid_keys()
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _printed_by(code: str) -> list[str]:
    """The words that a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_help_of_consolidate_imports_nothing_that_only_training_needs():
    probe = """
import contextlib, runpy, sys
sys.argv = ["consolidate", "--help"]
with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
    runpy.run_module("accel_moe.consolidate", run_name="__main__")
print(*sys.modules)
"""
    imported = _printed_by(probe)
    assert "accel_moe.experts.registration" in imported
    ours = [name for name in imported if name.startswith(("accel_moe.kernels", "accel_moe.hooks"))]
    assert not ours
    assert not {"torch.distributed.fsdp", "torch", "transformers", "accelerate", "peft"} & set(imported)


@pytest.mark.parametrize(
    "first, then",
    [
        ("transformers.integrations.moe", "accel_moe"),
        pytest.param("accel_moe", "transformers", marks=pytest.mark.slow),
    ],
)
def test_scattermoe_is_registered_whichever_is_imported_first(first, then):
    probe = f"""
import sys, {first}, {then}
from transformers.integrations import moe
assert moe.ALL_EXPERTS_FUNCTIONS["scattermoe"].__module__ == "accel_moe.kernels.scattermoe"
assert "SourceFileLoader" in str(moe.__loader__), moe.__loader__
assert moe.__spec__.loader is moe.__loader__
try:
    from transformers.distributed import expert_parallel
    own = getattr(expert_parallel, "EPImplementationInterface", None)
    assert own is None or "accel_moe" in own()
except ImportError:  # 5.17 has no such file: its hook goes on waiting
    waits = "transformers.distributed.expert_parallel"
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "_name", "") != waits]
print(*(type(finder).__module__ for finder in sys.meta_path))
"""
    assert "accel_moe.experts.registration" not in _printed_by(probe), "the import hooks have done their work: are gone"


def test_scattermoe_is_registered_by_the_second_import_where_the_first_failed():
    probe = """
import sys, accel_moe
sys.modules["transformers.integrations.sonicmoe"] = None  # the interface imports it
try:
    import transformers.integrations.moe
except ImportError:
    del sys.modules["transformers.integrations.sonicmoe"]
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
print("scattermoe" in ALL_EXPERTS_FUNCTIONS.valid_keys())
"""
    assert _printed_by(probe) == ["True"]


def test_the_public_names_are_there_before_they_are_imported():
    probe = """
import sys, accel_moe
assert set(accel_moe.__all__) <= set(dir(accel_moe)) and "torch" not in sys.modules
from accel_moe import MoEConfig
assert "torch" not in sys.modules
from accel_moe import *
import pickle
assert pickle.loads(pickle.dumps((prepare, from_pretrained, expert_load, MoEConfig))) == (
    accel_moe.prepare, accel_moe.from_pretrained, accel_moe.expert_load, MoEConfig)
assert accel_moe.dispatch.DISPATCHERS and not hasattr(accel_moe, "no_such_name")
"""
    assert _printed_by(probe) == []


def bring_tables_up_to_date():
    for page, begin, end, table in [
        (OPTIONS, TABLE_BEGIN, TABLE_END, options_table()),
        (FAMILIES, FAMILIES_BEGIN, FAMILIES_END, families_table()),
    ]:
        text = page.read_text()
        page.write_text(f"{text.split(begin)[0]}{begin}\n{table}\n{end}{text.split(end)[1]}")


if __name__ == "__main__":
    bring_tables_up_to_date()
