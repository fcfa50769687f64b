"""Which scheme for which layer: scores, budgets, and proven assignments. No torch in here."""

from ..scores.table import Scores
from .assignment import Assignment
from .budget import Budget
from .entry import solve
from .explain import Infeasible
from .frontier import Frontier, frontier

__all__ = ["Assignment", "Budget", "Frontier", "Infeasible", "Scores", "frontier", "solve"]
