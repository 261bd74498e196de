"""Search of layer factors: tasks, evaluator, genetic algorithm, executors, studies."""

from .algorithm import Algorithm, Candidate
from .algorithms import make_algorithm
from .executor import Executor, Job, LocalExecutor
from .genetic import GeneticAlgorithm
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
    "make_algorithm",
    "run_search",
]
