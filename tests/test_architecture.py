"""Check the rooms of the package, their imports and the sizes of files, read from the source with ast."""

import ast
import importlib
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sft_lightning"

# Top to bottom. A room imports from itself and from the rooms below its own line.
ROOMS = (
    {"__init__", "__main__"},
    {"cli"},
    {"diagnostics"},
    {"training"},
    {"reporting"},
    {"checkpointing"},
    {"models", "evaluation"},
    {"losses", "quickstart", "generation"},
    {"data", "lightning_compat"},
    {"grading", "optim", "distributed"},
    {"system"},
    {"errors"},
)
MAX_ROOT_ENTRIES = 20

# Third-party package -> the rooms or modules that may import it. Imports for annotations only are free.
USES_LIGHTNING = {"cli", "diagnostics.selftest", "training", "checkpointing", "lightning_compat"}
MAY_IMPORT = {
    "lightning": USES_LIGHTNING,
    "pytorch_lightning": set(),
    "lightning_fabric": set(),
    "transformers": {
        "models",
        "data.tokenization",
        "generation",
        "distributed.fsdp",
        "checkpointing.callback",
        "quickstart",
    },
    "flash_attn": {"models.attention"},
    "flash_attn_interface": {"models.attention"},
    "math_verify": {"grading.math_worker"},
}
# What loads a model, a config or a tokenizer with transformers, and with it the code that a folder may bring.
LOADERS = {"from_pretrained", "from_config", "_from_config", "from_model_config", "pipeline"}
# What the Trainer keeps for itself, although it has no underscore in front.
TRAINER_INTERNALS = {"fit_loop", "validate_loop", "test_loop", "predict_loop", "epoch_loop", "batch_progress"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
WITHOUT_TEST_FILE = {"__init__.py", "__main__.py", "errors.py"}


def module_name(path):
    """Returns a source file's dotted name inside the package: data/batch.py is data.batch, data/__init__.py is data."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name: path.read_text("utf-8") for name, path in PATHS.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
COMPAT = {name for name in TREES if name.startswith("lightning_compat")}


class WithoutAnnotationImports(ast.NodeTransformer):
    def visit_If(self, node):
        return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imported_names(tree):
    """Yields the full name of every import: `from a.b import c` is a.b.c."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(names=aliases, module=module, level=level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in aliases)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function) in ("importlib.import_module", "import_module", "__import__"):
                    yield name


def own_imports(tree):
    """Returns the package's own files that a file imports; a name that belongs to none stays as it is."""
    imports = set()
    for imported in imported_names(tree):
        package, _, name = imported.partition(".")
        if package == "sft_lightning" and name != "__version__":
            imports.add(next((file for file in (name, name.rpartition(".")[0]) if file in TREES), imported))
    return imports


def within(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def room_of(name):
    return name.partition(".")[0]


def depth_of(name):
    """Returns the line of ROOMS that a module belongs to, -1 where its room is not listed."""
    return next((depth for depth, rooms in enumerate(ROOMS) if room_of(name) in rooms), -1)


def attribute_chain(node):
    """Returns the names in `a.b(x).c` from the left: a, b, c."""
    return re.findall(r"[A-Za-z_]\w*", re.sub(r"\([^()]*\)|\[[^\[\]]*\]", "", ast.unparse(node)))


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def touches_of_lightning_internals(tree):
    """Yields imports of private Lightning names, and attributes of trainers and loops that are not for everyone."""
    for imported in imported_names(tree):
        if within(imported, {"lightning"}) and any(map(is_private, imported.split("."))):
            yield imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            *owners, attribute = attribute_chain(node)
            of_trainer = any("trainer" in owner or "loop" in owner for owner in owners)
            if attribute in TRAINER_INTERNALS or (of_trainer and is_private(attribute)):
                yield ast.unparse(node)


def calls_that_may_run_remote_code(tree):
    """Yields loaders of transformers that are not handed to without_remote_code, and names that import such code."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    guarded = {node.args[0] for node in calls if ast.unparse(node.func) == "without_remote_code" and node.args}
    for node in ast.walk(tree):
        named = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if named in LOADERS and node not in guarded:
            yield ast.unparse(node)
    yield from (name for name in imported_names(tree) if name.rpartition(".")[2] in LOADERS | {"dynamic_module_utils"})


def test_the_rules_detect_planted_violations():
    tree = ast.parse(
        "from lightning.pytorch.cli import _private\n"
        "from sft_lightning.data import batch\n"
        "if TYPE_CHECKING:\n"
        "    import transformers\n"
        "def f():\n"
        "    from sft_lightning.losses.functional import token_nll\n"
        "    importlib.import_module('math_verify')\n"
        "    self.trainer.strategies(a.b)[0]._x + trainer.fit_loop.run + self._own + os._exit + trainer.__dict__\n"
    )
    names = {
        "lightning.pytorch.cli._private",
        "sft_lightning.data.batch",
        "transformers",
        "sft_lightning.losses.functional.token_nll",
        "math_verify",
    }
    assert set(imported_names(tree)) == names
    assert own_imports(tree) == {"data.batch", "losses.functional"}
    assert sorted(touches_of_lightning_internals(tree)) == [
        "lightning.pytorch.cli._private",
        "self.trainer.strategies(a.b)[0]._x",
        "trainer.fit_loop",
    ]
    assert set(imported_names(WithoutAnnotationImports().visit(tree))) == names - {"transformers"}
    loads = (
        "from transformers import pipeline\n"
        "without_remote_code(A.from_pretrained, path)\n"
        "load = Auto.from_pretrained\n"
        "f(type(model).from_config(config), getattr(x, name))\n"
    )
    found = ["Auto.from_pretrained", "type(model).from_config", "transformers.pipeline"]
    assert list(calls_that_may_run_remote_code(ast.parse(loads))) == found
    assert [depth_of(name) for name in ("cli.main", "data.batch", "errors", "stray")] == [1, 8, 11, -1]
    assert {"__init__", "data", "data.batch", "losses.functional"} <= TREES.keys()


def test_every_module_is_in_a_room():
    wrong = [name for name in TREES if depth_of(name) < 0]
    assert not wrong, f"{wrong}: give each a room of ROOMS, or add the room"
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ROOT_ENTRIES


def test_every_room_names_its_imports_and_a_first_file():
    wrong = []
    for folder in {path.parent for path in PATHS.values()} - {PACKAGE}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
        files = re.findall(r"[\w/]+\.py", text.partition("start with ")[2])
        if "may import" not in text or not files or not all((folder / file).is_file() for file in files):
            wrong.append(str(folder.relative_to(PACKAGE)))
    assert wrong == []


def test_rooms_import_downwards():
    wrong = []
    for name, tree in TREES.items():
        for target in own_imports(tree):
            if target not in TREES:
                wrong.append(f"{name} -> {target}: no file; import a name from where it lives")
            elif room_of(target) != room_of(name) and depth_of(target) <= depth_of(name):
                wrong.append(f"{name} -> {target}: upwards")
    assert not wrong, "\n".join(map(str, wrong))


def test_imports_make_no_circle():
    graph = {name: own_imports(tree) - {name} for name, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle in it


def test_imports_are_absolute():
    wrong = [
        (name, imported) for name, tree in TREES.items() for imported in imported_names(tree) if imported[0] == "."
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_third_party_packages_stay_in_their_rooms():
    wrong = []
    for name, source in SOURCES.items():
        for imported in imported_names(WithoutAnnotationImports().visit(ast.parse(source))):
            rooms = MAY_IMPORT.get(imported.split(".")[0])
            if rooms is not None and not within(name, rooms):
                wrong.append((name, imported))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_loader_of_transformers_goes_through_one_place():
    wrong = {name: list(calls_that_may_run_remote_code(tree)) for name, tree in TREES.items()}
    assert {name: calls for name, calls in wrong.items() if calls} == {}
    assert sum(source.count("trust_remote_code=") for source in SOURCES.values()) == 1


def test_only_lightning_compat_touches_private_names_of_lightning():
    wrong = {name: list(touches_of_lightning_internals(TREES[name])) for name in TREES.keys() - COMPAT}
    assert {name: touches for name, touches in wrong.items() if touches} == {}


def test_no_class_shares_a_private_name_with_a_lightning_base():
    """Not to use Lightning's, and not by accident either: it would overwrite it."""
    private_name = re.compile(r"(?:\bself\.|\bsuper\(\)\.|\bdef )(_[a-z]\w*)")
    wrong = []
    for name in TREES.keys() - COMPAT - {"__main__"}:
        if not within(name, USES_LIGHTNING):
            continue
        module = importlib.import_module(f"sft_lightning.{name}")
        for own in vars(module).values():
            if not inspect.isclass(own) or own.__module__ != module.__name__:
                continue
            for base in own.__mro__:
                if base.__module__.startswith("lightning."):
                    shared = set(private_name.findall(inspect.getsource(own)))
                    shared &= set(private_name.findall(inspect.getsource(base)))
                    wrong += [(own.__qualname__, base.__qualname__, shared)] if shared else []
    assert not wrong, "\n".join(map(str, wrong))


def test_files_and_functions_are_short():
    wrong = []
    for name, source in SOURCES.items():
        if len(source.splitlines()) > MAX_FILE_LINES:
            wrong.append(f"{name}: {len(source.splitlines())} lines")
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = node.end_lineno - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    wrong.append(f"{name}.{node.name}: {num_lines} lines")
    assert not wrong, "\n".join(map(str, wrong))


def test_every_source_file_has_its_test_file():
    sources = [path.relative_to(PACKAGE) for path in PATHS.values() if path.name not in WITHOUT_TEST_FILE]
    mirrors = [Path("tests") / path.with_name(f"test_{path.name}") for path in sources]
    missing = [str(mirror) for mirror in mirrors if not (ROOT / mirror).is_file()]
    assert not missing, "\n".join(missing)
