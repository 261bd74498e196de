"""Search of layer factors: tasks, evaluator, genetic algorithm, executors, studies."""

from .optimizers.genetic import GeneticAlgorithm
from .optimizers.protocol import Candidate, Optimizer
from .optimizers.registry import make_algorithm
from .scores import Job
from .study.run import SearchOutcome, SearchSettings, run_search
from .study.store import Study
from .workers.protocol import Executor, LocalExecutor

__all__ = [
    "Candidate",
    "Executor",
    "GeneticAlgorithm",
    "Job",
    "LocalExecutor",
    "Optimizer",
    "SearchOutcome",
    "SearchSettings",
    "Study",
    "make_algorithm",
    "run_search",
]
