"""Direction of imports, purity of the ops, and no pickle anywhere: read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("ttt_dist", "parallel", "launch")  # each may import itself and what stands before it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def imported_modules(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all modules that the code imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = [*parent, node.module] if node.level else [node.module]
            module = ".".join(part for part in base if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("__import__", "importlib.import_module", "import_module"):
                value = node.args[0]
                # A name that is only known at run time can't be checked: none is allowed.
                assert isinstance(value, ast.Constant), f"import of {ast.unparse(value)}"
                yield str(value.value)


def parse(path: Path) -> tuple[ast.Module, str]:
    package = ".".join(path.parent.relative_to(ROOT).parts)
    return ast.parse(path.read_text(), filename=str(path)), package


def top_levels(code: ast.AST, package: str) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(code, package)}


def test_the_reader_of_imports_sees_every_form():
    code = ast.parse(
        "import launch.train as t\n"
        "def f():\n    from parallel import mesh\n"
        "from . import state\nfrom .. import layer\nfrom .data.audio import x\n"
        "import importlib\nimportlib.import_module('launch.optim')\n__import__('pickle')\n"
    )
    found = set(imported_modules(code, "ttt_dist.ops"))
    assert {"launch.train", "parallel.mesh", "launch.optim", "pickle"} <= found
    assert {"ttt_dist.ops.state", "ttt_dist.layer", "ttt_dist.ops.data.audio"} <= found


def test_every_package_has_sources():
    for layer in LAYERS:
        assert sum(path.relative_to(ROOT).parts[0] == layer for path in SOURCES) > 3


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_from_launch_to_parallel_to_ttt_dist(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests"}
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] == layer):
        wrong = top_levels(*parse(path)) & above
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_model_knows_no_mesh_and_no_process_group():
    """DTensor placements are its only words of the kind (ttt_dist/placement.py)."""
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] == "ttt_dist"):
        modules = set(imported_modules(*parse(path)))
        if path.name != "placement.py":
            modules = {m for m in modules if not m.startswith("torch.distributed.tensor")}
        forbidden = {"torchtitan", "torch.distributed.device_mesh", "torch.distributed.fsdp"}
        wrong = {m for m in modules if any(m == f or m.startswith(f + ".") for f in forbidden)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"
        if path.name != "placement.py":
            assert not any(m.startswith("torch.distributed") for m in modules), path


def test_ops_import_torch_and_the_standard_library_alone():
    allowed = set(sys.stdlib_module_names) | {"torch"}
    paths = sorted((ROOT / "ttt_dist" / "ops").rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        for module in imported_modules(*parse(path)):
            own = module == "ttt_dist.ops" or module.startswith("ttt_dist.ops.")
            assert own or module.split(".")[0] in allowed, f"{path.name} imports {module}"


def test_ops_run_where_nothing_but_torch_can_be_imported():
    program = """
import sys
BLOCKED = {"moshi", "torchtitan", "safetensors", "huggingface_hub", "einops", "sentencepiece",
           "sphn", "pydantic", "yaml", "wandb", "tqdm", "matplotlib", "parallel", "launch"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name.startswith("ttt_dist.moshi"):
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
try:
    import moshi
except ImportError:
    pass
else:
    raise SystemExit("the block doesn't work")
import torch
from ttt_dist.ops import mlp_state, ttt_mlp
q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
state = mlp_state(torch.randn(2, 4, 8), torch.zeros(2, 1, 8), torch.randn(2, 8, 4),
                  torch.zeros(2, 1, 4), 1)
out, _ = ttt_mlp(q, k, v, torch.full((1, 2, 5), 0.1), torch.ones(2, 4), torch.zeros(2, 4), state,
                 mini_batch_size=2)
print(tuple(out.shape), sorted(BLOCKED & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 2, 5, 4) []"


def pickle_readers(code: ast.AST, package: str) -> list[str]:
    """Imports of pickle modules, and calls that unpickle or run what a file holds."""
    found = [m for m in imported_modules(code, package) if m.split(".")[0] in PICKLES]
    for node in ast.walk(code):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in (
                "torch.load",
                "torch.jit.load",
                "eval",
                "exec",
                "yaml.load",
                "yaml.full_load",
            ):
                found.append(name)
            found += [f"{name}(allow_pickle=…)" for k in node.keywords if k.arg == "allow_pickle"]
            given = {keyword.arg for keyword in node.keywords}
            if name == "dcp.load" and "storage_reader" not in given:
                found.append("dcp.load(…)")  # DCP's own reader unpickles metadata
            if name.endswith("FileSystemReader"):
                found.append(name)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name == "load"]
    return found


def test_the_search_for_pickles_finds_them():
    code = ast.parse(
        "import pickle\nimport torch\nfrom torch import load\ntorch.load('x')\n"
        "np.load('x', allow_pickle=True)\n"
        "dcp.load({}, storage_reader=dcp.FileSystemReader('x'))\ndcp.load({}, checkpoint_id='x')\n"
    )
    expected = ["pickle", "torch.load", "torch.load", "np.load(allow_pickle=…)"]
    expected += ["dcp.FileSystemReader", "dcp.load(…)"]
    assert sorted(pickle_readers(code, "launch")) == sorted(expected)


RESTRICTED = ROOT / "parallel" / "checkpoint_metadata.py"


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_unpickles(layer):
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] == layer):
        expected = ["pickle"] if path == RESTRICTED else []
        assert pickle_readers(*parse(path)) == expected, path.relative_to(ROOT)


def test_the_one_unpickler_chooses_what_it_looks_up():
    """DCP's metadata is a pickle; tests/unit/test_checkpoint_files.py plants code into one."""
    tree, _ = parse(RESTRICTED)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = {a.attr for a in attributes if ast.unparse(a.value) == "pickle"}
    assert names == {"Unpickler", "UnpicklingError"}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    (unpickler,) = [c for c in classes if [ast.unparse(b) for b in c.bases] == ["pickle.Unpickler"]]
    assert "find_class" in {n.name for n in unpickler.body if isinstance(n, ast.FunctionDef)}
