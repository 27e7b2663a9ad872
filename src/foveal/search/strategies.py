"""Ways to search, each a short composition of operators; named after the papers whose loop they follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveal._errors import TaskError, UnknownNameError
from foveal.search.endpoint import Endpoint
from foveal.search.operators.base import Operator
from foveal.search.operators.bayes import Bayes
from foveal.search.operators.external import External
from foveal.search.operators.language import LanguageModel, Manner
from foveal.search.operators.parameters import Crossover, Draw, Mutate
from foveal.search.operators.rewrites import Rewrites


@dataclass(frozen=True)
class Strategy:
    """Operators, and the share of proposals whose operator is drawn at random."""

    name: str
    operators: tuple[Operator, ...]
    random_share: float = 0.1


@dataclass(frozen=True)
class Means:
    """What a strategy may use: a language model, a command."""

    endpoint: Endpoint | None = None
    command: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A strategy by name: what it does, its paper, and how it is put together."""

    name: str
    summary: str
    paper: str
    build: Callable[[Means], Sequence[Operator]]
    random_share: float = 0.1
    needs: str = ""


def _parameters(means: Means) -> Sequence[Operator]:
    return Bayes(), Mutate(), Crossover()


def _everything(means: Means) -> Sequence[Operator]:
    own: list[Operator] = [Bayes(), Mutate(), Crossover(), Rewrites()]
    if means.endpoint is not None:
        own.append(LanguageModel(means.endpoint, Manner()))
    if means.command is not None:
        own.append(External(means.command))
    return own


def _model(
    manner: Manner, *others: Callable[[], Operator]
) -> Callable[[Means], Sequence[Operator]]:
    def build(means: Means) -> Sequence[Operator]:
        assert means.endpoint is not None
        return LanguageModel(means.endpoint, manner), *(make() for make in others)

    return build


def _command(means: Means) -> Sequence[Operator]:
    assert means.command is not None
    return External(means.command), Mutate()


_MODEL, _COMMAND = "a language model (--model-url)", "a command (--external)"

RECIPES = (
    Recipe("full", "all operators there are, chosen by gain per second", "", _everything),
    Recipe("random", "random points: what others are compared with", "", lambda means: (Draw(),)),
    Recipe(
        "bayes",
        "expected improvement per second of a Gaussian process",
        "Snoek, Larochelle, Adams, Practical Bayesian Optimization of Machine Learning Algorithms, 2012",
        lambda means: (Bayes(),),
    ),
    Recipe(
        "evolution",
        "mutation and crossover of parameters",
        "",
        lambda means: (Mutate(), Crossover()),
    ),
    Recipe(
        "kernel_foundry",
        "an archive of niches, a model with prompts that evolve, parameters of templates",
        "KernelFoundry: Hardware-aware evolutionary GPU kernel optimization, 2026, arXiv 2603.12440",
        _model(Manner(evolving=True), Mutate, Crossover),
        0.2,
        _MODEL,
    ),
    Recipe(
        "robust_kbench",
        "a model under strict verification, with random restarts among elites",
        "Towards Robust Agentic CUDA Kernel Benchmarking, Verification, and Optimization, 2025, "
        "arXiv 2509.14279",
        _model(Manner(inspirations=4), Crossover),
        0.1,
        _MODEL,
    ),
    Recipe(
        "autokernel",
        "one edit at a time, kept when it is faster, else undone",
        "AutoKernel: Autonomous GPU Kernel Optimization via Iterative Agent-Driven Search, 2026, "
        "arXiv 2603.21331",
        lambda means: (Rewrites(), Mutate(), *_optional(means)),
        0.0,
    ),
    Recipe(
        "kernel_smith",
        "top and diverse programs of the archive as inspirations; steps kept for training",
        "Kernel-Smith: A Unified Recipe for Evolutionary Kernel Optimization, 2026, arXiv 2603.28342",
        _model(Manner(inspirations=6, lessons=0)),
        0.0,
        _MODEL,
    ),
    Recipe(
        "kernel_blaster",
        "what helped in such a state before leads the next edit",
        "KernelBlaster: Continual Cross-Task CUDA Optimization via Memory-Augmented In-Context "
        "Reinforcement Learning, 2026, arXiv 2602.14293",
        _model(Manner(judged=True, lessons=8)),
        0.0,
        _MODEL,
    ),
    Recipe(
        "avo",
        "an autonomous editor as the operator of variation",
        "AVO: Agentic Variation Operators for Autonomous Evolutionary Search, 2026, arXiv 2603.24517",
        _command,
        0.1,
        _COMMAND,
    ),
    Recipe(
        "kernel_evolve",
        "one universal operator on a graph of programs, with retrieved notes",
        "KernelEvolve: Scaling Agentic Kernel Coding for Heterogeneous AI Accelerators at Meta, 2025, "
        "arXiv 2512.23236",
        _model(Manner(lessons=5, inspirations=3), Bayes),
        0.1,
        _MODEL,
    ),
    Recipe(
        "cuda_forge",
        "a judge names one bottleneck and one change, a coder carries it out",
        "CudaForge: An Agent Framework with Hardware Feedback for CUDA Kernel Optimization, 2025",
        _model(Manner(judged=True, inspirations=0, lessons=0)),
        0.0,
        _MODEL,
    ),
    Recipe(
        "cuda_llm",
        "compile, test, measure; the message of the stage that failed leads the next attempt",
        "CUDA-LLM: LLMs Can Write Efficient CUDA Kernels, 2025, arXiv 2506.09092",
        _model(Manner(inspirations=0, lessons=0)),
        0.0,
        _MODEL,
    ),
)


def _optional(means: Means) -> Sequence[Operator]:
    return () if means.endpoint is None else (LanguageModel(means.endpoint, Manner()),)


def strategy(name: str, means: Means = Means()) -> Strategy:
    """A strategy by its name.  Raises UnknownNameError, and TaskError for one that lacks what it needs."""
    recipes = {recipe.name: recipe for recipe in RECIPES}
    if name not in recipes:
        raise UnknownNameError("strategy", name, tuple(recipes))
    recipe = recipes[name]
    missing = (recipe.needs == _MODEL and means.endpoint is None) or (
        recipe.needs == _COMMAND and means.command is None
    )
    if missing:
        raise TaskError(f"strategy {name}: it needs {recipe.needs}")
    return Strategy(name, tuple(recipe.build(means)), recipe.random_share)
