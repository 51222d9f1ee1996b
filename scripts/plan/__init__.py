"""What an experiment will cost, before it runs: ``fewstep plan``."""

from scripts.plan.costs import Plan, RolePlan, Strategy, plan_of
from scripts.plan.step import StepCost
from scripts.plan.table import as_dict, format_plan

__all__ = ["Plan", "RolePlan", "StepCost", "Strategy", "as_dict", "format_plan", "plan_of"]
