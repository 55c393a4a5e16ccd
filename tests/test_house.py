"""Holds the house to its plan: what may import what, whose names are whose, what every public name says of itself."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import optax
import pytest

from jaxcl import adapters, bottleneck, masked_prior, masks, quantize, tokenizer
from jaxcl.continual import (
    a_gem,
    adapted_network,
    against_means,
    answered_by,
    class_means,
    classification,
    der_plus_plus,
    er,
    ewc,
    independent,
    key_value_bottleneck,
    linear_probe,
    lwf,
    masked_network,
    naive,
    nearest_class_mean,
    online_ewc,
    ridge_classifier,
    si,
    streaming_lda,
)

ROOT = Path(__file__).parent.parent
# From the ground to the roof: a floor imports only from those before it.
FLOORS = (
    "typing", "files", "trees", "threefry", "nearest", "reconstruction", "quantize", "tokenizer", "masked_prior",
    "bottleneck", "masks", "gaussian", "coding", "adapters", "continual", "nets", "data", "report",
)  # fmt: skip
LONGEST = 400


def house():
    """{dotted module name: source} of jaxcl; a package goes by its own name."""
    sources = {}
    for path in sorted((ROOT / "jaxcl").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def is_package(name, modules):
    return any(module.startswith(f"{name}.") for module in modules)


def imports(name, source, modules):
    """What a module imports, as (imported module, name taken from it or None, local name, line).

    A name that is itself a module of the house counts as that module, taken whole.
    """
    package = name if is_package(name, modules) else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, alias.asname or alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *base.split(".")]).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                taken = (inner, None) if inner in modules else (base, alias.name)
                yield *taken, alias.asname or alias.name, node.lineno


def floor(module):
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else None


# The checkers: each takes {module: source} and returns one line an offence


def import_offences(sources):
    """Imports that do not point down, and imports of what stands on the house."""
    offences = []
    for name, source in sources.items():
        if name != "jaxcl" and floor(name) is None:
            offences.append(f"{name}: on no floor of the plan")
        for target, _, _, line in imports(name, source, sources):
            where = f"{name}:{line} imports {target}"
            if target.split(".")[0] in ("experiments", "tests"):
                offences.append(where)
            elif target == "jaxcl" or target.startswith("jaxcl."):
                mine, theirs = floor(name), floor(target)
                same = theirs is not None and mine == theirs and is_package(f"jaxcl.{FLOORS[mine]}", sources)
                if not same and (mine is None or theirs is None or theirs >= mine):
                    offences.append(where)
    return offences


def cycle_offences(sources):
    """Modules that reach themselves through imports of modules of the house."""
    graph = {
        name: {target for target, *_ in imports(name, source, sources) if target in sources}
        for name, source in sources.items()
    }
    offences = []
    for name, imported in graph.items():
        reached, waiting = set(), set(imported)
        while waiting:
            module = waiting.pop()
            reached.add(module)
            waiting |= graph[module] - reached
        if name in reached:
            offences.append(f"{name}: imports itself in a circle")
    return offences


def is_private(name):
    return name is not None and name.startswith("_") and not name.startswith("__")


def dotted(node):
    """`a.b.c` of an attribute chain that starts at a name, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""


def private_offences(sources):
    """Private names taken from another module of the house, by import or as an attribute of the module."""
    offences = []
    for name, source in sources.items():
        aliases = {}
        for target, taken, local, line in imports(name, source, sources):
            if target.split(".")[0] != "jaxcl":
                continue
            if any(is_private(part) for part in [*target.split("."), taken]):
                offences.append(f"{name}:{line} imports {target}.{taken}")
            if taken is None:
                aliases[local] = target
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and dotted(node.value) in aliases:
                offences.append(f"{name}:{node.lineno} reads {aliases[dotted(node.value)]}.{node.attr}")
    return offences


def length_offences(sources):
    lengths = {name: len(source.splitlines()) for name, source in sources.items()}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > LONGEST]


def public_definitions(name, source):
    """(dotted name, node) of public classes and functions at the top of a module, and of such classes' methods."""
    waiting = [(name, node) for node in ast.parse(source).body]
    while waiting:
        owner, node = waiting.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{owner}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                waiting += [(f"{owner}.{node.name}", child) for child in node.body]


def docstring_offences(sources):
    return [
        f"{name}:{node.lineno} has no docstring"
        for module, source in sources.items()
        for name, node in public_definitions(module, source)
        if not ast.get_docstring(node)
    ]


def names_arrays(annotation):
    """Whether an annotation names an array type; a function that is passed around takes its own arrays."""
    if annotation is None or (isinstance(annotation, ast.Subscript) and dotted(annotation.value) == "Callable"):
        return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return names_arrays(ast.parse(annotation.value, mode="eval").body)
    if dotted(annotation).rpartition(".")[2] in ("Array", "ArrayLike", "ndarray"):
        return True
    return any(names_arrays(child) for child in ast.iter_child_nodes(annotation))


SHAPE = re.compile(r"\[[^\[\]]*(?:\.\.\.|\b[A-Z])[^\[\]]*\]|\[\]")
ANY_SHAPE = re.compile(r"any shape|same axes")
FIELD_SHAPE = re.compile(r"\[(?:[^\[\]]*[a-zA-Z.][^\[\]]*)?\]")


def needs_shape(node):
    """Whether a function takes or returns arrays by annotation; not so one that returns None, a check of any array."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    check = isinstance(node.returns, ast.Constant) and node.returns.value is None
    return not check and any(map(names_arrays, [*(argument.annotation for argument in arguments), node.returns]))


def shape_offences(sources):
    """Public functions of arrays whose docstring gives no shape, and array fields whose comment gives none.

    A shape is square brackets around an axis letter or "...", as in [..., D], or empty ones; in a field's comment the
    axis may be a word, as in [samples]. A function of arrays of any shape may say so instead.
    """
    offences = []
    for module, source in sources.items():
        lines = source.splitlines()
        for name, node in public_definitions(module, source):
            if isinstance(node, ast.ClassDef):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                for field in filter(lambda field: names_arrays(field.annotation), fields):
                    if not FIELD_SHAPE.search(lines[field.end_lineno - 1].partition("  # ")[2]):
                        offences.append(f"{name}.{field.target.id}:{field.lineno} names no shape")
            elif needs_shape(node):
                text = ast.get_docstring(node) or ""
                if not SHAPE.search(text) and not ANY_SHAPE.search(text):
                    offences.append(f"{name}:{node.lineno} names no shape")
    return offences


MACHINE_PATH = re.compile(r"(?<![\w.~}/])(?:/(?:home|root|work|workspace|mnt|Users)/\w|[A-Z]:\\\\?Users\\)")


def path_offences(texts):
    """Absolute paths that exist on somebody's machine only, from {file name: text}."""
    return [
        f"{name}:{number} {match.group()}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for match in MACHINE_PATH.finditer(line)
    ]


def tracked_texts():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of tracked files")
    texts = {}
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and b"\0" not in (content := path.read_bytes()):
            texts[name] = content.decode(errors="replace")
    return texts


# The house

CHECKS = [
    import_offences, cycle_offences, private_offences, length_offences, docstring_offences, shape_offences,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_is_as_planned(check):
    sources = house()
    assert {"jaxcl", "jaxcl.typing", "jaxcl.trees", "jaxcl.continual", "jaxcl.continual.loop"} <= set(sources)
    assert check(sources) == []


def test_no_tracked_file_holds_a_path_of_a_machine():
    texts = tracked_texts()
    assert "pyproject.toml" in texts
    assert path_offences(texts) == []


# The checkers, on houses with a fault

GROUND = {"jaxcl": "", "jaxcl.typing": "", "jaxcl.trees": "", "jaxcl.continual": "", "jaxcl.continual.loop": ""}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxcl.typing", "from jaxcl.trees import bank"),
        ("jaxcl.typing", "import jaxcl.trees"),
        ("jaxcl.typing", "from jaxcl import trees"),
        ("jaxcl.typing", "from . import trees"),
        ("jaxcl.typing", "from .trees import bank"),
        ("jaxcl.trees", "def f():\n    from jaxcl.continual.loop import run"),
        ("jaxcl.trees", "if True:\n    import jaxcl.continual as c"),
        ("jaxcl.trees", "from jaxcl import *"),
        ("jaxcl.trees", "import jaxcl"),
        ("jaxcl", "from jaxcl.typing import Array"),
        ("jaxcl.continual.loop", "from ..report import html_report"),
        ("jaxcl.continual.loop", "import experiments.common"),
        ("jaxcl.continual.loop", "from tests.helpers import golden"),
        ("jaxcl.attic", ""),
    ],
)
def test_an_import_that_does_not_point_down_is_caught(module, source):
    assert len(import_offences(GROUND | {module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxcl.trees", "from jaxcl.typing import Array\nimport jax\nfrom collections import abc"),
        ("jaxcl.continual.loop", "from jaxcl import trees\nfrom jaxcl.continual.metrics import forgetting"),
        ("jaxcl.continual", "from jaxcl.continual.loop import run\nfrom .loop import run_seeds"),
    ],
)
def test_an_import_that_points_down_is_not(module, source):
    assert import_offences(GROUND | {module: source}) == []


@pytest.mark.parametrize(
    "faulty",
    [
        {
            "jaxcl.continual": "from jaxcl.continual import loop",
            "jaxcl.continual.loop": "from jaxcl.continual import x",
        },
        {"jaxcl.continual.loop": "from . import a", "jaxcl.continual.a": "from jaxcl.continual.loop import run"},
        {"jaxcl.trees": "from jaxcl.trees import bank"},
    ],
)
def test_a_circle_is_caught(faulty):
    assert len(cycle_offences(GROUND | faulty)) == len(faulty)
    assert cycle_offences(GROUND | dict([next(iter(faulty.items()))]) | {"jaxcl.trees": ""}) == []


@pytest.mark.parametrize(
    "source",
    [
        "from jaxcl.typing import _check",
        "from jaxcl.typing import Array, _check as check",
        "from ..typing import _check",
        "from jaxcl import typing\ntyping._check(1)",
        "from jaxcl import typing as t\nx = t._check",
        "import jaxcl.typing\njaxcl.typing._check(1)",
        "import jaxcl.typing as t\ndel t._check",
        "from jaxcl._secret import thing",
    ],
)
def test_a_private_name_of_another_module_is_caught(source):
    assert len(private_offences(GROUND | {"jaxcl.continual.loop": source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from jaxcl.trees import Rows\nRows._make((1, 2))._replace(values=3)",
        "from jax._src import core\ncore._x",
        "_own = 1\nself._own",
        "from jaxcl import trees\ntrees.__name__",
    ],
)
def test_a_private_name_of_its_own_or_of_a_class_is_not(source):
    assert private_offences(GROUND | {"jaxcl.continual.loop": source}) == []


def test_a_long_module_is_caught():
    assert length_offences({"jaxcl.trees": "x = 1\n" * 400}) == []
    assert length_offences({"jaxcl.trees": "x = 1\n" * 401}) == ["jaxcl.trees: 401 lines"]


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("def f(): pass", ["jaxcl.trees.f:1"]),
        ("class A:\n    '''It.'''\n    def g(self): pass", ["jaxcl.trees.A.g:3"]),
        ("class A: pass", ["jaxcl.trees.A:1"]),
        ("def _f(): pass\nclass _A: pass\ndef f():\n    '''It.'''\n    def inner(): pass", []),
        ("class A:\n    '''It.'''\n    def __len__(self): return 0", []),
    ],
)
def test_a_missing_docstring_is_caught(source, caught):
    assert docstring_offences({"jaxcl.trees": source}) == [f"{name} has no docstring" for name in caught]


@pytest.mark.parametrize(
    "signature",
    [
        "x: Array",
        "x: 'jax.Array'",
        "*, x: ArrayLike | None = None",
        "x: tuple[np.ndarray, int]",
        "x) -> dict[str, Array",
    ],
)
@pytest.mark.parametrize(
    ("text", "sound"),
    [
        ("Vectors [..., D].", True),
        ("A bank, [T, ...].", True),
        ("A scalar [].", True),
        ("Counts of `x` of any shape.", True),
        ("Vectors.", False),
        ("A number in [0, 1], see extras [experiments].", False),
    ],
)
def test_an_array_without_a_shape_is_caught(signature, text, sound):
    closing = "]" if signature.count("[") > signature.count("]") else ")"
    source = f"def f({signature}{closing}:\n    '''{text}'''"
    assert shape_offences({"jaxcl.trees": source}) == ([] if sound else ["jaxcl.trees.f:1 names no shape"])


@pytest.mark.parametrize(
    ("field", "sound"),
    [
        ("x: Array  # [B, D]", True),
        ("x: Array | None  # [C, D, W]; None where there is none", True),
        ("x: list[np.ndarray]  # N arrays [samples]", True),
        ("x: Array", False),
        ("x: Array  # in [0, 1]", False),
        ("x: Array  # the rows", False),
        ("n: int", True),
        ("f: Callable[[Array], Array]", True),
    ],
)
def test_a_field_without_a_shape_is_caught(field, sound):
    source = f"class State(NamedTuple):\n    '''It.'''\n    {field}"
    assert shape_offences({"jaxcl.trees": source}) == ([] if sound else ["jaxcl.trees.State.x:3 names no shape"])


@pytest.mark.parametrize("signature", ["n: int", "f: Callable[[Array], Array]", "key: Key", "tree: PyTree"])
def test_what_takes_no_array_needs_no_shape(signature):
    assert shape_offences({"jaxcl.trees": f"def f({signature}) -> float:\n    '''It.'''"}) == []


@pytest.mark.parametrize(
    "path", ["/".join(["", "home", "ada", "x"]), "/".join(["", "root", "x"]), "\\".join(["C:", "Users", "ada"])]
)
@pytest.mark.parametrize("before", ["", " ", '"', "=", "("])
def test_a_path_of_a_machine_is_caught(path, before):
    assert len(path_offences({"a.md": f"first\n{before}{path}"})) == 1


@pytest.mark.parametrize("rest", ["https://example.org{}", "~{}", "$HOME{}", "../shared{}", "${{ROOT}}{}"])
def test_a_path_below_something_else_is_not(rest):
    assert path_offences({"a.md": rest.format("/".join(["", "home", "ada"]))}) == []


# Contracts: the members of what every factory returns, and what they take

QUANTIZER = {
    "init": "key",
    "quantize": "params, state, x, mask=None",
    "lookup": "params, state, indices",
    "update": "key, params, state, x, indices, *, axis_name=None",
    "place": "key, params, state, x, *, iterations=0, axis_name=None",
}
TOKENIZER = {
    "init": "key, inputs",
    "reconstruct": "params, state, inputs, mask=None",
    "encode": "params, state, inputs, mask=None",
    "decode": "params, state, indices",
}
TRAINER = {"init": "key, inputs", "step": "key, before, inputs, mask=None"}
MASKED_PRIOR = {
    "init": "key",
    "loss": "key, params, tokens, labels=None",
    "sample": "key, params, labels, *, steps=8, temperature=1.0, choice_temperature=4.5, guidance=0.0",
}
BOTTLENECK = {
    "init": "key",
    "heads": "state, features",
    "place": "key, params, state, features, *, iterations=0, axis_name=None",
    "fit_keys": "key, params, state, features, *, axis_name=None",
    "lookup": "params, state, features, *, used_only=False",
    "distances": "state, features, indices",
    "read": "params, indices",
    "count_usage": "state, indices",
}
MASK_METHOD = {
    "init": "key, params",
    "sample": "key, masked, state",
    "protect": "masked, updates, state",
    "commit": "key, masked, state, task",
    "select": "masked, state, task",
    "current": "masked, state",
    "bank": "state",
}
ADAPTER = {
    "init": "key, params",
    "changes": "adapter, state",
    "penalty": "adapter, state",
    "track": "adapter, state",
    "commit": "key, adapter, state",
}
STRATEGY = {
    "init": "key, params, batch",
    "begin_task": "key, params, state, task",
    "gradients": "key, params, state, batch",
    "after_update": "key, params, state, batch, grads, updates",
    "refresh": "key, params, state, batch",
    "observe": "key, params, state, batch",
    "end_task": "key, params, state",
    "predict": "params, state, inputs, task",
}


def signature_of(function):
    """The arguments as a call sees them, without their types."""
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(plain))[1:-1]


def signatures(method):
    """{member: signature} of the functions of a NamedTuple of functions."""
    return {name: signature_of(member) for name, member in method._asdict().items() if callable(member)}


def small_bottleneck(**options):
    return bottleneck.discrete_key_value_bottleneck(4, 3, codebooks=2, pairs=5, key_width=2, **options)


def network(params, inputs):
    return inputs


def small_tokenizer():
    return tokenizer.tokenizer(network, network, quantize.vq(5, 3))


MEMORY = {"memory_size": 5, "memory_batch_size": 2}
FACTORIES = {
    "vq": (lambda: quantize.vq(5, 3), QUANTIZER),
    "simvq": (lambda: quantize.simvq(5, 3), QUANTIZER),
    "simvq, trained codebook": (lambda: quantize.simvq(5, 3, hidden=4, train_codebook=True), QUANTIZER),
    "ema_vq": (lambda: quantize.ema_vq(5, 3), QUANTIZER),
    "fsq": (lambda: quantize.fsq([5, 4]), QUANTIZER),
    "lfq": (lambda: quantize.lfq(4), QUANTIZER),
    "residual": (lambda: quantize.residual(quantize.vq(5, 3), 2), QUANTIZER),
    "grouped": (lambda: quantize.grouped(quantize.vq(5, 3), 2), QUANTIZER),
    "projected": (lambda: quantize.projected(quantize.vq(5, 3), 6, 3), QUANTIZER),
    "tokenizer": (small_tokenizer, TOKENIZER),
    "trainer": (lambda: tokenizer.trainer(small_tokenizer(), optax.sgd(1.0), network), TRAINER),
    "masked_prior": (lambda: masked_prior.masked_prior(network, 5, 9), MASKED_PRIOR),
    "bottleneck, random projection": (small_bottleneck, BOTTLENECK),
    "bottleneck, chunks": (lambda: small_bottleneck(projection="chunk", top_k=2), BOTTLENECK),
    "ib_masks": (lambda: masks.ib_masks(bool, 2), MASK_METHOD),
    "ib_masks, as the authors": (lambda: masks.ib_masks(bool, 2, scale_rule="authors"), MASK_METHOD),
    "winning_subnetwork": (lambda: masks.winning_subnetwork(bool, 2, sparsity=0.5), MASK_METHOD),
    "packnet": (lambda: masks.packnet(bool, 2, share=0.5, prune_after=3), MASK_METHOD),
    "lora": (lambda: adapters.lora(bool, 2), ADAPTER),
    "incremental_lora": (lambda: adapters.incremental_lora(bool, 2, 2), ADAPTER),
    "o_lora": (lambda: adapters.o_lora(bool, 2, 2), ADAPTER),
    "oa_adapter": (lambda: adapters.oa_adapter(bool, 2, 2), ADAPTER | {"measure": "state, moments"}),
    "oa_adapter, outputs": (lambda: adapters.oa_adapter(bool, 2, 2, orthogonal_to="outputs"), ADAPTER),
    "naive": (lambda: naive(network), STRATEGY),
    "independent": (lambda: independent(network, 2), STRATEGY),
    "ewc": (lambda: ewc(network, strength=1.0), STRATEGY),
    "online_ewc": (lambda: online_ewc(network, strength=1.0), STRATEGY),
    "si": (lambda: si(network, strength=1.0), STRATEGY),
    "lwf": (lambda: lwf(network, strength=1.0), STRATEGY),
    "er": (lambda: er(network, **MEMORY), STRATEGY),
    "der_plus_plus": (lambda: der_plus_plus(network, **MEMORY, logits_strength=1.0, labels_strength=1.0), STRATEGY),
    "a_gem": (lambda: a_gem(network, **MEMORY), STRATEGY),
    "linear_probe": (linear_probe, STRATEGY),
    "key_value_bottleneck": (lambda: key_value_bottleneck(small_bottleneck()), STRATEGY),
    "masked_network": (lambda: masked_network(masks.packnet(bool, 2, share=0.5, prune_after=3), network), STRATEGY),
    "adapted_network": (
        lambda: adapted_network(adapters.oa_adapter(bool, 2, 2), {}, classification(network, network)),
        STRATEGY,
    ),
    "against_means": (
        lambda: against_means(class_means(naive(network), network), lambda params, means, which: params),
        STRATEGY,
    ),
    "answered_by": (lambda: answered_by(streaming_lda(), naive(network), network), STRATEGY),
    "class_means": (lambda: class_means(naive(network), network, drift_width=0.3), STRATEGY),
    "nearest_class_mean": (nearest_class_mean, STRATEGY),
    "streaming_lda": (streaming_lda, STRATEGY),
    "ridge_classifier": (ridge_classifier, STRATEGY),
    "key_value_bottleneck, momentum": (lambda: key_value_bottleneck(small_bottleneck(), momentum=0.9), STRATEGY),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_keeps_its_contract(name):
    factory, contract = FACTORIES[name]
    assert signatures(factory()) == contract


def test_a_strategy_has_three_members_that_are_no_functions():
    assert set(naive(network)._fields) - set(STRATEGY) == {"refresh_every", "fresh_optimizer", "tasks"}


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (lambda key, params, state, x, indices, *, axis_name=None: 0, True),
        (lambda key, params, state, indices, x, *, axis_name=None: 0, False),
        (lambda key, params, state, x, indices, axis_name=None: 0, False),
        (lambda key, params, state, x, indices, *, axis_name: 0, False),
        (lambda key, params, state, x, indices: 0, False),
        (lambda *args, **options: 0, False),
    ],
)
def test_a_member_that_takes_something_else_is_caught(changed, same):
    method = quantize.vq(5, 3)._replace(update=changed)
    assert (signatures(method) == QUANTIZER) is same
