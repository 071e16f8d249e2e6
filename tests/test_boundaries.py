"""Who may import whom, and what may stand nowhere in the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [ROOT / "app.py", *sorted((ROOT / "pages").rglob("*.py"))]
ENGINE = sorted((ROOT / "oms_core").rglob("*.py"))
EVERYTHING = [path for path in SHOWN + ENGINE if path.exists()]

WARM_UP = {"pages/common/shell.py": {"oms_core.families.ddpm"}}  # imported early in a thread, never used there


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node but what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


def imports(source: str) -> set[str]:
    """The full names that a file imports anywhere: `from a import b` counts as a.b."""
    names = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text())


def below(names: set[str], *packages: str) -> set[str]:
    """Those names that lie in one of the packages."""
    return {name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def engine(*names: str) -> list[Path]:
    """Files of the engine by name; a folder means all its files."""
    chosen = []
    for name in names:
        path = ROOT / "oms_core" / name
        chosen += sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return chosen


def own(path: Path) -> set[str]:
    return below(imports_of(path), "oms_core")


@pytest.mark.parametrize("path", ENGINE, ids=name_of)
def test_the_engine_never_heard_of_the_app(path: Path) -> None:
    assert not below(imports_of(path), "streamlit", "pages", "app")


@pytest.mark.parametrize("path", [path for path in SHOWN if path.exists()], ids=name_of)
def test_pages_get_arrays_and_tables_and_never_tensors(path: Path) -> None:
    inner = ("oms_core.families", "oms_core.denoiser", "oms_core.training", "oms_core.convert", "oms_core.assemble")
    found = below(imports_of(path), "torch", "diffusers", "transformers", "safetensors", *inner)
    assert found <= WARM_UP.get(name_of(path), set())


@pytest.mark.parametrize("path", engine("attacks"), ids=name_of)
def test_an_attack_knows_the_search_and_no_family(path: Path) -> None:
    allowed = ("search", "ddim", "convergence", "gradients", "denoiser", "attacks", "errors", "libraries")
    assert own(path) == below(own(path), *(f"oms_core.{name}" for name in allowed))


@pytest.mark.parametrize("path", engine("families"), ids=name_of)
def test_a_family_knows_no_attack_and_no_run(path: Path) -> None:
    assert not below(
        own(path), *(f"oms_core.{name}" for name in ("attacks", "search", "run", "compute", "cache", "jobs"))
    )


@pytest.mark.parametrize("path", engine("search", "ddim", "convergence", "gradients", "schemes"), ids=name_of)
def test_the_equations_know_only_the_model(path: Path) -> None:
    assert own(path) == below(own(path), "oms_core.search", "oms_core.denoiser", "oms_core.errors")


@pytest.mark.parametrize("path", engine("metrics", "figures"), ids=name_of)
def test_figures_are_made_from_tables_alone(path: Path) -> None:
    assert not below(imports_of(path), "torch", "diffusers", "transformers")
    slow = ("families", "attacks", "compute", "cache", "denoiser", "jobs")
    assert not below(own(path), *(f"oms_core.{name}" for name in slow))


@pytest.mark.parametrize(
    "path", engine("decode", "files", "folders", "images", "layouts", "catalog", "cache", "run"), ids=name_of
)
def test_the_fast_half_needs_no_network(path: Path) -> None:
    assert not below(imports_of(path), "torch", "diffusers", "oms_core.families", "oms_core.compute")


def test_the_loop_of_the_search_is_written_once() -> None:
    """`fixed_point` is the only place where iterates are collected; who needs them calls it."""
    definitions = [path for path in ENGINE if "def fixed_point" in path.read_text()]
    assert [name_of(path) for path in definitions] == ["oms_core/search.py"]


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b
from c import d
if TYPE_CHECKING:
    from hidden import x
def f():
    try:
        from e.f import g as h
    except ImportError:
        import i as j
"""
    assert imports(source) == {"a.b", "c.d", "e.f.g", "i"}
    assert below({"a.b", "ab", "a"}, "a") == {"a.b", "a"}


# What may stand nowhere

UNSAFE_MODULES = (
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "runpy",
    "telnetlib",
)
UNSAFE_CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "pd.read_pickle", "pandas.read_pickle"}
MUST_BE_FALSE = {"allow_pickle", "trust_remote_code", "shell", "unsafe_allow_html"}
NEVER_GIVEN = {"persist"}


def offences(source: str) -> list[str]:
    """What a file must not contain: pickles, code from data, shells, raw HTML."""
    found = sorted(below(imports(source), *UNSAFE_MODULES))
    for node in statements(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in UNSAFE_CALLS or called.endswith(".to_pickle"):
            found.append(called)
        found += [word for word in MUST_BE_FALSE if keywords.get(word, "False") != "False"]
        found += [word for word in NEVER_GIVEN if word in keywords]
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_nothing_unsafe_stands_in_the_code(path: Path) -> None:
    assert offences(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import dill",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=whatever)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "st.markdown(text, unsafe_allow_html=True)",
        "@st.cache_data(persist='disk')\ndef f(): pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "pd.read_pickle(path)",
        "table.to_pickle(path)",
        "__import__(name)",
    ],
)
def test_the_scan_sees_what_is_unsafe(line: str) -> None:
    assert offences(line)


@pytest.mark.parametrize(
    "line", ["torch.load(path, weights_only=True)", "model.eval()", "np.load(path)", "f(shell=False)", "re.compile(x)"]
)
def test_the_scan_lets_the_rest_pass(line: str) -> None:
    assert offences(line) == []


def test_there_is_an_app_and_an_engine_to_scan() -> None:
    names = set(map(name_of, EVERYTHING))
    assert {"app.py", "oms_core/run.py", "oms_core/families/ddpm.py", "oms_core/attacks/base.py"} <= names


def test_ray_is_imported_in_one_file() -> None:
    assert [name_of(path) for path in EVERYTHING if below(imports_of(path), "ray")] == ["oms_core/distributed.py"]
