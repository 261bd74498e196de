"""Search of layer factors: tasks, evaluator, genetic algorithm, executors, studies."""

from .executor import Executor, Job, LocalExecutor
from .genetic import Algorithm, Candidate, GeneticAlgorithm
from .search import SearchOutcome, SearchSettings, run_search
from .study import Study

__all__ = [
    "Algorithm",
    "Candidate",
    "Executor",
    "GeneticAlgorithm",
    "Job",
    "LocalExecutor",
    "SearchOutcome",
    "SearchSettings",
    "Study",
    "run_search",
]
