"""Papers on making and judging kernels: what `foveal search` and `foveal verify` take from each."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveal.systems.base import Check, Tool

_PROGRAM = "def candidate(x):\n    return x.exp() / x.exp().sum(-1, keepdim=True)\n"
_REPLY = "```python\ndef candidate(x):\n    return x.softmax(-1)\n```"


@contextmanager
def _view(source: random.Random, reason: str = "") -> Iterator[Any]:
    """An archive with a start, a faster child and, with a reason, a child that failed."""
    from foveal.search.acceptance import WON, Decision
    from foveal.search.archive import Archive, Evaluation
    from foveal.search.candidate import Candidate, Proposal
    from foveal.search.operators.base import View
    from foveal.search.task import Case, Input, Task, source_program

    case = Case("3x5", (Input("x", (3, 5), "float32"),))
    reference = source_program("def reference(x):\n    return x.softmax(-1)\n", "reference")
    task = Task("softmax", reference, (case,), source_program(_PROGRAM, "candidate"))
    with tempfile.TemporaryDirectory() as folder, Archive(Path(folder) / "a.db") as archive:
        start = archive.add(Proposal(Candidate(), "start"))
        assert start is not None
        archive.take()
        found = Evaluation(True, "timing", "", 1.0, 1.0, {"operators": 5.0}, (0, 1, 0, 0))
        archive.record(start, found, place=found.cell, accepted=(None, 0.0))
        gain = source.uniform(0.1, 0.5)
        child = archive.add(Proposal(Candidate(text=_PROGRAM + "\n"), "rewrite", (start,), "edit"))
        assert child is not None
        archive.take()
        faster = Evaluation(True, "timing", "", 1 / (1 - gain), 1.0, {}, (0, 0, 0, 0))
        won = Decision(WON, gain, 20, "")
        archive.record(
            child,
            faster,
            place=faster.cell,
            challenges=((start, "challenge", won, {}),),
            accepted=(start, gain),
        )
        if reason:
            wrong = archive.add(
                Proposal(Candidate(text="def candidate(x): return x"), "m", (child,))
            )
            assert wrong is not None
            archive.take()
            archive.record(wrong, Evaluation(False, "numerics", reason))
        yield View(task, archive)


class _Scripted:
    """An endpoint that gives one answer, and keeps what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.asked: list[str] = []

    def ask(self, messages: Any, prompt: str = "") -> Any:
        from foveal.search.endpoint import Reply

        self.asked.append("\n".join(each["content"] for each in messages))
        return Reply(self.replies.pop(0), 0, 0, 0.0, 0.0, "")


def _proposes(source: random.Random, manner: Any, *replies: str, reason: str = "") -> list[str]:
    """What a model is asked when it proposes once; its reply must become a candidate."""
    from foveal.search.operators.language import LanguageModel

    scripted = _Scripted(*replies)
    with _view(source, reason) as view:
        operator = LanguageModel(scripted, manner)  # type: ignore[arg-type]
        proposal = operator.propose(view, source)
    assert proposal is not None
    return scripted.asked


def _closed_form(source: random.Random) -> bool:
    import torch

    from foveal.search.gaussian import expected_improvement

    mean, deviation, best = source.gauss(0, 1), source.uniform(0.2, 2), source.gauss(0, 1)
    generator = torch.Generator().manual_seed(source.getrandbits(31))
    drawn = torch.randn(200_000, generator=generator, dtype=torch.float64) * deviation + mean
    sampled = (best - drawn).clamp(min=0)
    closed = expected_improvement(torch.tensor([mean]), torch.tensor([deviation]), best)
    spread = float(sampled.std()) / math.sqrt(len(sampled))
    return abs(float(closed) - float(sampled.mean())) <= 6 * spread + 1e-9


def _same_cell(source: random.Random) -> bool:
    from foveal.search.candidate import Candidate, cell_of

    facts = {
        name: source.uniform(0, 4) for name in ("shared", "resident", "copies", "matrix_share")
    }
    shuffled = dict(source.sample(list(facts.items()), len(facts)))
    named = Candidate({"a": 1}, "x = 1  # fast"), Candidate({"a": 1}, "x = 1  # slow")
    return cell_of(facts) == cell_of(shuffled) and named[0].id != named[1].id


def _no_luck(source: random.Random) -> bool:
    from foveal.search.simulate import modelled, rates

    return rates(modelled(), 0.0, 150, source.getrandbits(31)).wins == 0.0


def _amdahl(source: random.Random) -> bool:
    from foveal.search.schedule import Part, ranked, whole

    share = source.uniform(0.3, 0.6)
    parts = [Part("small", (1 - share) / 2), Part("large", share, 1.0, 3.0)]
    limit = whole([Part("large", share, 1e9)])
    return ranked(parts)[0].name == "large" and math.isclose(limit, 1 / (1 - share), rel_tol=1e-6)


def _steps(source: random.Random) -> bool:
    from foveal.search.export import steps

    with _view(source, "off by one") as view:
        every = list(steps(view.archive, view.task))
        kept = list(steps(view.archive, view.task, gainful=True))
    return len(every) == 2 and len(kept) == 1 and bool(kept[0]["correct"] and kept[0]["accepted"])


def _lessons(source: random.Random) -> bool:
    gains = [source.gauss(0, 0.1) for _ in range(9)]
    with _view(source) as view:
        for gain in gains:
            view.archive.learn("0000 memory", "tile", gain, "cpu")
        (lesson,) = view.archive.lessons("0000 memory")
    return math.isclose(lesson.mean, statistics.mean(gains), abs_tol=1e-12) and math.isclose(
        lesson.deviation, statistics.stdev(gains), abs_tol=1e-12
    )


def _edits_a_folder(source: random.Random) -> bool:
    from foveal.search.operators.external import External

    with _view(source) as view:
        proposal = External("sed -i s/sum/mean/ program.py").propose(view, source)
    return proposal is not None and "mean" in str(proposal.candidate.text)


def _retrieves(source: random.Random) -> bool:
    from foveal.search.operators.language import Manner, task_card

    with _view(source) as view:
        champion = view.archive.champion()
        state = "0000 unknown"
        view.archive.learn(state, "fuse both passes", 0.2, "cpu")
        card = task_card(view, champion, _PROGRAM, Manner(lessons=5))
    return "fuse both passes" in card


def _one_change(source: random.Random) -> bool:
    from foveal.search.operators.language import Manner

    plan = '{"bottleneck": "memory", "method": "fuse", "plan": "one pass"}'
    asked = _proposes(source, Manner(judged=True, inspirations=0, lessons=0), plan, _REPLY)
    return len(asked) == 2 and "memory; fuse; one pass" in asked[1]


def _feedback(source: random.Random) -> bool:
    from foveal.search.operators.language import Manner, task_card

    reason = f"row {source.randrange(1000)} is wrong"
    with _view(source, reason) as view:
        champion = view.archive.champion()
        return reason in task_card(view, champion, _PROGRAM, Manner(lessons=0, inspirations=0))


def _backends(source: random.Random) -> bool:
    from foveal.search.artefact import MOST_SHARED, MULTIPROCESSORS
    from foveal.search.compiling import TARGETS

    return set(TARGETS) == set(MOST_SHARED) == set(MULTIPROCESSORS) and "gfx942" in TARGETS


def _grades(source: random.Random) -> bool:
    from foveal.search.grades import Outcome, proficiency

    right, wrong, faster = Outcome(True, 0.9), Outcome(False), Outcome(True, 1.2)
    mixed = [right] * source.randint(2, 5) + [wrong] * source.randint(1, 5)
    source.shuffle(mixed)
    found = [[wrong] * 3, [wrong, right], mixed, [right] * 4, [faster, wrong]]
    return [proficiency(each) for each in found] == [0, 0.25, 0.5, 0.75, 1]


def _rewards(source: random.Random) -> bool:
    from foveal.search.grades import Outcome, reward

    slow, fast = sorted((source.uniform(0.1, 1.9), source.uniform(2, 4)))
    return (
        0
        == reward(Outcome(False, 9.0))
        < reward(Outcome(True, slow))
        < reward(Outcome(True, fast))
        <= reward(Outcome(True, 100.0))
    )


def _searching(strategy: str, needs: str = "") -> str:
    return f"foveal search TASK --strategy {strategy}{needs}"


_MODEL = " --model-url URL"
_STRATEGY = "foveal.search.strategies:strategy"
Holds = Callable[[random.Random], bool]


def _check(name: str, statement: str, holds: Holds) -> tuple[Check, ...]:
    return (Check(name, statement, holds),)


TOOLS = (
    Tool(
        "kernel_foundry",
        "KernelFoundry: Hardware-aware evolutionary GPU kernel optimization",
        2026,
        "arXiv 2603.12440",
        "an archive of niches, a model whose prompts evolve, parameters of templates",
        _searching("kernel_foundry", _MODEL),
        _STRATEGY,
        _check("niche", "a niche follows from measured facts, not from names or texts", _same_cell),
    ),
    Tool(
        "robust_kbench",
        "Towards Robust Agentic CUDA Kernel Benchmarking, Verification, and Optimization",
        2025,
        "arXiv 2509.14279",
        "strict verification: fresh inputs, several styles, gradients, no do-nothing kernel passes",
        "foveal verify FILE",
        "foveal.search.verify.judge:Judge",
        _check("no luck", "identical programs do not win against each other", _no_luck),
    ),
    Tool(
        "autokernel",
        "AutoKernel: Autonomous GPU Kernel Optimization via Iterative Agent-Driven Search",
        2026,
        "arXiv 2603.21331",
        "profile a model, rank its parts by Amdahl's law, work down the list one edit at a time",
        _searching("autokernel"),
        "foveal.search.schedule:ranked",
        _check("Amdahl", "a part of share p speeds the whole up by 1 / (1 - p) at most", _amdahl),
    ),
    Tool(
        "kernel_smith",
        "Kernel-Smith: A Unified Recipe for Evolutionary Kernel Optimization",
        2026,
        "arXiv 2603.28342",
        "fast and diverse programs as inspirations; correct, gainful steps kept for training",
        _searching("kernel_smith", _MODEL) + " --export FILE",
        "foveal.search.export:steps",
        _check("steps", "steps kept for training are correct and faster than their parent", _steps),
    ),
    Tool(
        "concur",
        "ConCuR: Conciseness Makes State-of-the-Art Kernel Generation",
        2025,
        "arXiv 2510.07356",
        "records of task, programs, reason of the edit and verdict, as JSON lines for training",
        _searching("full") + " --export FILE",
        "foveal.search.export:write_steps",
        _check("verified", "every record says whether its program was correct", _steps),
    ),
    Tool(
        "kernel_blaster",
        "KernelBlaster: Continual Cross-Task CUDA Optimization via Memory-Augmented In-Context "
        "Reinforcement Learning",
        2026,
        "arXiv 2602.14293",
        "what an action gained in a state is remembered across tasks and leads the next edit",
        _searching("kernel_blaster", _MODEL) + " --lessons FILE",
        "foveal.search.knowledge:read",
        _check("memory", "the memory holds mean and deviation of all outcomes", _lessons),
    ),
    Tool(
        "avo",
        "AVO: Agentic Variation Operators for Autonomous Evolutionary Search",
        2026,
        "arXiv 2603.24517",
        "any command that edits a program is the operator of variation",
        _searching("avo", " --external COMMAND"),
        "foveal.search.operators.external:External",
        _check("folder", "what the command leaves in its folder is the candidate", _edits_a_folder),
    ),
    Tool(
        "kernel_evolve",
        "KernelEvolve: Scaling Agentic Kernel Coding for Heterogeneous AI Accelerators at Meta",
        2025,
        "arXiv 2512.23236",
        "one universal operator on a graph of programs, with what is known retrieved into its prompt",
        _searching("kernel_evolve", _MODEL),
        _STRATEGY,
        _check("retrieval", "what helped in the state of a program is in its prompt", _retrieves),
    ),
    Tool(
        "cudaforge",
        "CudaForge: An Agent Framework with Hardware Feedback for CUDA Kernel Optimization",
        2025,
        "arXiv id not established",
        "a judge names one bottleneck and one change by measured facts, a coder carries it out",
        _searching("cuda_forge", _MODEL),
        _STRATEGY,
        _check("one change", "the plan of the judge is what the coder is asked for", _one_change),
    ),
    Tool(
        "cuda_llm",
        "CUDA-LLM: LLMs Can Write Efficient CUDA Kernels",
        2025,
        "arXiv 2506.09092",
        "compile, test, measure; the message of the stage that failed leads the next attempt",
        _searching("cuda_llm", _MODEL),
        _STRATEGY,
        _check("feedback", "the reason of a rejection is in the next prompt", _feedback),
    ),
    Tool(
        "multikernelbench",
        "MultiKernelBench: A Multi-Platform Benchmark for Kernel Generation",
        2025,
        "arXiv id not established",
        "one task on several platforms: NVIDIA and AMD by Triton, compiled where they are not here, and CPU",
        "foveal search tile/causal --compile-for gfx942",
        "foveal.search.compiling:compiled_facts",
        _check("platforms", "every platform has limits that candidates are held to", _backends),
    ),
    Tool(
        "codex_hpc_eval",
        "Evaluation of OpenAI Codex for HPC Parallel Programming Models Kernel Generation",
        2023,
        "arXiv 2306.15121",
        "a grade from 0 to 1 for the first ten kernels that a model writes",
        "python: foveal.search.grades.proficiency(outcomes)",
        "foveal.search.grades:proficiency",
        _check(
            "grades",
            "none, one, some, all, and a faster first one are 0, 1/4, 1/2, 3/4, 1",
            _grades,
        ),
    ),
    Tool(
        "makora_env",
        "Fine-Tuning GPT-5 for GPU Kernel Generation",
        2026,
        "arXiv 2602.11000",
        "a judge that cannot be fooled as the reward of training",
        "python: foveal.search.grades.reward(outcome)",
        "foveal.search.grades:reward",
        _check(
            "reward", "nothing for what is wrong, more for what is faster, up to a limit", _rewards
        ),
    ),
    Tool(
        "bayes_opt",
        "Practical Bayesian Optimization of Machine Learning Algorithms",
        2012,
        "J. Snoek, H. Larochelle, R. P. Adams, NIPS 2012, arXiv 1206.2944",
        "expected improvement per second of a Gaussian process proposes the sizes to try",
        _searching("bayes"),
        "foveal.search.operators.bayes:Bayes",
        _check("expected improvement", "its closed form is its mean over draws", _closed_form),
    ),
)
