"""The package from outside: its import, its public names, its wheel, and the guide to its source.

``python tests/test_package.py`` rewrites public_surface.txt.
"""

from __future__ import annotations

import ast
import email
import enum
import importlib.metadata
import inspect
import itertools
import re
import subprocess
import sys
import tarfile
import tomllib
import types
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement

import gdopt
from gdopt import _jax

ROOT = Path(__file__).resolve().parents[1]
SURFACE = Path(__file__).with_name("public_surface.txt")
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
HEAVY = {"equinox", "flax", "matplotlib", "orbax", "scipy.optimize", "sklearn", "tqdm"}


def test_import_loads_nothing_heavy() -> None:
    """Beyond the modules that jax and optax load by themselves."""
    program = "import sys, jax, optax; before = {*sys.modules}; import gdopt; print(*{*sys.modules} - before)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(run.stdout.split())
    assert "gdopt" in loaded
    assert loaded.isdisjoint(HEAVY), loaded & HEAVY


def test_version_is_the_installed_one() -> None:
    assert gdopt.__version__ == importlib.metadata.version("gdopt")


def test_a_package_that_is_installed_is_the_one_that_is_tested() -> None:
    """`make release` runs the tests with a wheel. An editable installation has no files of its own."""
    files = importlib.metadata.files("gdopt") or []
    installed = [Path(str(file.locate())) for file in files if file.as_posix() == "gdopt/__init__.py"]
    assert all(path.samefile(gdopt.__file__) for path in installed)


def test_dir_shows_only_the_public_names() -> None:
    assert set(dir(gdopt)) - {name for name in dir(gdopt) if re.fullmatch("__.*__", name)} == set(gdopt.__all__)
    assert {"__doc__", "__file__", "__name__", "__version__"} <= set(dir(gdopt))
    assert all(hasattr(gdopt, name) for name in dir(gdopt))
    assert {"plot", "prox", "schedules"} <= set(dir(gdopt))
    for module in (gdopt.plot, gdopt.prox, gdopt.schedules):
        assert dir(module) == sorted(module.__all__)


def public_names(module: types.ModuleType) -> list[str]:
    """``__all__``, or without one the public names that the module itself defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def public_members(cls: type) -> dict[str, Any]:
    """Return the members that gdopt itself gives the class. A field without a default is ``Parameter.empty``."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] == "gdopt":
            annotations: dict[str, Any] = vars(base).get("__annotations__", {})
            members |= dict.fromkeys(annotations, inspect.Parameter.empty) | vars(base)
    return {name: value for name, value in sorted(members.items()) if not name.startswith("_")}


def signature(function: Any) -> str:
    """Return names, kinds and defaults, with functions by their names, so that it reads the same everywhere."""

    class Name(str):
        __repr__ = str.__str__

    parsed = inspect.signature(function)
    parameters = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=Name(parameter.default.__name__)
            if callable(parameter.default) and parameter.default is not inspect.Parameter.empty
            else parameter.default,
        )
        for parameter in parsed.parameters.values()
    ]
    return str(parsed.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def describe(name: str, value: Any) -> Iterator[str]:
    """The public surface of one name, line by line."""
    if isinstance(value, types.ModuleType):
        yield name
        for inner in public_names(value):
            yield from describe(f"{name}.{inner}", getattr(value, inner))
    elif isinstance(value, type):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})" if bases else f"class {name}"
        for inner, member in public_members(value).items():
            yield from describe_member(f"{name}.{inner}", member)
    elif callable(value):
        yield name + signature(value)
    else:
        yield f"{name}: {type(value).__name__}"


def describe_member(name: str, member: Any) -> Iterator[str]:
    if isinstance(member, classmethod | staticmethod):
        member = member.__func__
    if isinstance(member, enum.Enum):
        yield f"{name} = {member.value!r}"
    elif inspect.isroutine(member):
        yield name + signature(member)
    else:  # a property or a field
        yield name


def surface() -> str:
    """Return the current text of public_surface.txt."""
    names = public_names(gdopt)
    return "".join(f"{line}\n" for name in names for line in describe(f"gdopt.{name}", getattr(gdopt, name)))


def test_public_surface_is_the_recorded_one() -> None:
    recorded = SURFACE.read_text(encoding="utf-8").splitlines() if SURFACE.exists() else []
    current = surface().splitlines()
    gone = [f"  - {line}" for line in recorded if line not in current]
    new = [f"  + {line}" for line in current if line not in recorded]
    if gone or new:
        pytest.fail(
            "the public surface is not what tests/public_surface.txt says:\n"
            + "\n".join(gone + new)
            + "\nIf it is meant, run `python tests/test_package.py` and write a line for users in CHANGELOG.md.",
            pytrace=False,
        )


def documented() -> Iterator[tuple[str, Any]]:
    """Return each public name that should have a docstring, with its object."""
    for name in public_names(gdopt):
        value = getattr(gdopt, name)
        if isinstance(value, types.ModuleType):
            yield from ((f"{name}.{inner}", getattr(value, inner)) for inner in public_names(value))
        elif isinstance(value, type):
            members = public_members(value).items()
            yield from ((f"{name}.{inner}", member) for inner, member in members if is_documentable(member))
        if is_documentable(value):
            yield name, value


def is_documentable(value: Any) -> bool:
    is_plain_field = value is inspect.Parameter.empty or isinstance(value, enum.Enum)
    return not is_plain_field and (callable(value) or isinstance(value, types.ModuleType | property | classmethod))


@pytest.mark.parametrize(("name", "value"), [pytest.param(*item, id=item[0]) for item in documented()])
def test_public_names_are_documented(name: str, value: Any) -> None:
    text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__  # a class inherits none
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"{name} has only the docstring that a dataclass gives itself"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


def built(target: str, folder: Path) -> Path:
    """The file that hatchling builds, a wheel or an sdist."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder]
    subprocess.run(build, cwd=ROOT, capture_output=True, timeout=120, check=True)
    (file,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return file


def test_wheel_holds_the_package(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path for path in (ROOT / "src" / "gdopt").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert "gdopt/py.typed" in files
    assert files == {path.relative_to(ROOT / "src").as_posix() for path in sources}


def test_sdist_holds_what_its_tests_read(tmp_path: Path) -> None:
    sdist = built("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    held |= {str(folder) for name in held for folder in PurePosixPath(name).parents}
    expected = {"LICENSE", "README.md", "SECURITY.md", ".pre-commit-config.yaml", "constraints-floor.txt", "Makefile"}
    expected |= {*paths(CONTRIBUTING.read_text(encoding="utf-8"))}
    assert expected <= held


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def urls(wheel: Path) -> dict[str, str]:
    return dict(line.split(", ") for line in metadata(wheel).get_all("Project-URL", []))


def test_links_of_the_description_are_absolute_and_lead_to_files(wheel: Path) -> None:
    """A package index shows the README away from the repository."""
    description = str(metadata(wheel).get_payload())
    source = urls(wheel)["Source"]
    pages = f"{source}/blob/main/"
    pictures = f"{source.replace('github.com', 'raw.githubusercontent.com')}/main/"
    link = re.compile(r"""(!?)\[[^\]]*\]\(\s*([^)\s]+)|(?:src|href)=["']([^"']+)|^\[[^\]]+\]:\s*(\S+)""", re.MULTILINE)
    found = [(mark, inline or html or definition) for mark, inline, html, definition in link.findall(description)]
    assert len(found) > 10
    for mark, target in found:
        assert target.startswith("https://"), f"{target} is relative"
        if mark or target.startswith(source):
            prefix = pictures if mark else pages
            assert target.startswith(prefix), f"{target} does not start with {prefix}"
            path = target.removeprefix(prefix).split("#")[0]
            assert (ROOT / path).exists(), f"{target} leads to a file that does not exist"
    # The rest of the text is README.md as it is.
    assert description.replace(pages, "").replace(pictures, "") == (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_of_the_metadata_exists(wheel: Path) -> None:
    page = urls(wheel)["Changelog"]
    assert page == f"{urls(wheel)['Source']}/blob/main/CHANGELOG.md"
    assert (ROOT / "CHANGELOG.md").exists()


def test_the_classifiers_name_the_versions_of_python_that_are_tested(wheel: Path) -> None:
    """``make test-floor`` takes the first of all versions that is found, ``make test-newest`` the last."""
    classifiers = metadata(wheel).get_all("Classifier", [])
    named = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", "\n".join(classifiers), re.MULTILINE)
    newest, floor = make_variable("NEWEST").split(), make_variable("FLOOR").split()
    assert named == floor
    assert newest == floor[:0:-1]
    assert metadata(wheel)["Requires-Python"] == f">={floor[0]}"


def make_variable(name: str) -> str:
    """The value that the Makefile gives to a variable, as it stands there."""
    (value,) = re.findall(rf"^{name} *[:?]= *(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return value


def pins(name: str) -> dict[str, str]:
    """The versions that a constraints file pins with ``==``, by package."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))


def test_constraints_floor_pins_the_floors() -> None:
    """``make test-floor`` runs with the versions that pyproject.toml promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    promised = [*project["dependencies"], *extras["plot"], *extras["progress"], *extras["checkpoint"]]
    floors = pins("constraints-floor.txt")
    for requirement in map(Requirement, promised):
        (floor,) = requirement.specifier
        assert floor.operator == ">="
        pinned = floors[requirement.name]
        assert pinned in requirement.specifier, f"{requirement.name} {pinned} is older than {floor}"
        assert re.fullmatch(rf"{re.escape(floor.version)}(\.0)*", pinned), f"{requirement.name} {pinned} is newer"


@pytest.mark.parametrize(
    ("row", "file"), [("oldest", "constraints-floor.txt"), ("pinned", "constraints.txt")], ids=["oldest", "pinned"]
)
def test_the_readme_names_the_tested_versions(row: str, file: str) -> None:
    (line,) = re.findall(rf"^\| {row} \|.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:5] == [pins(file)[package] for package in ("jax", "numpy", "optax")]


def test_only_one_module_imports_private_parts_of_jax() -> None:
    for path in sorted(Path(gdopt.__file__).parent.rglob("*.py")):
        text = path.read_text()
        used = re.findall(r"jax\._src|jax\.extend|jax\.core\b|jax\.interpreters|from jax import core", text)
        assert set(used) <= ({"jax._src", "jax.extend", "jax.core"} if path.name == "_jax.py" else set()), path.name
    imports = re.findall(r"^\s*(?:import|from) .*", Path(_jax.__file__).read_text(), re.MULTILINE)
    assert not [line for line in imports if "_src" in line or "extend" in line]


def test_nothing_is_unpickled_or_evaluated() -> None:
    """SECURITY.md promises that reading a checkpoint executes no code."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        names = {name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in names_in(node)}
        assert names.isdisjoint({"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "eval", "exec"}), path


def names_in(node: ast.AST) -> Iterator[str]:
    """The names that a node of a program uses or imports itself."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.ImportFrom):
        yield (node.module or "").split(".")[0]
    elif isinstance(node, ast.alias):
        yield node.name.split(".")[0]


def paths(text: str) -> list[str]:
    """The code spans of a page that are paths."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    path = re.compile(r"[\w.-]+(/[\w.-]+)+|[\w.-]+\.(md|py|toml|txt|yaml)")
    return [span for span in spans if path.fullmatch(span)]


def test_paths_in_the_guide_exist() -> None:
    found = paths(CONTRIBUTING.read_text(encoding="utf-8"))
    assert len(found) > 50
    assert not [path for path in found if not (ROOT / path).exists()]


def test_names_in_a_recipe_are_in_its_file() -> None:
    """A point of a recipe begins with a file, and the names in it are names in that file."""
    recipes = CONTRIBUTING.read_text(encoding="utf-8").partition("\n## Recipes\n")[2]
    points = re.findall(r"^- `([^`]+)`: (.*(?:\n  .*)*)", recipes, re.MULTILINE)
    named = {(path, name) for path, text in points for name in re.findall(r"`([A-Za-z_]\w*)`", text)}
    assert len(named) > 40
    known = {path: set(re.findall(r"\w+", (ROOT / path).read_text(encoding="utf-8"))) for path, _ in points}
    assert not [f"{name} is not in {path}" for path, name in sorted(named) if name not in known[path]]


def test_the_guide_lists_every_module_in_the_order_of_imports() -> None:
    (table,) = re.findall(r"^\| module or room .*\n((?:\|.*\n)+)", CONTRIBUTING.read_text("utf-8"), re.MULTILINE)
    listed = [Path(path).stem for row in table.splitlines() for path in paths(row.split("|")[1])]
    package = ROOT / "src" / "gdopt"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert sorted(listed) == sorted(rooms | {path.stem for path in package.glob("*.py")} - {"__init__"})
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [layer.split(" : ") for layer in contracts["contracts"][0]["layers"]]
    rest = iter(listed)
    assert [{*itertools.islice(rest, len(layer))} for layer in layers] == [{*layer} for layer in layers]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_targets_on_a_page_are_targets_of_make(page: str) -> None:
    named = set(re.findall(r"^make ([a-z][\w-]*)|`make ([a-z][\w-]*)", (ROOT / page).read_text("utf-8"), re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {first or second for first, second in named} <= set(targets)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^lint: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    for name in ("RUN", "VENV"):  # the first one is made of the second
        recipe = recipe.replace(f"$({name})", make_variable(name))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^ +entry: (.*)", hooks, re.MULTILINE) == re.findall(r"^\t(.*)", recipe, re.MULTILINE)


if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
    print(f"wrote {SURFACE.relative_to(ROOT)}")
