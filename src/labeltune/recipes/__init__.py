"""Composition root: plan, train, evaluate, compare, predict, export and check data, each wired in one function that reads like a page."""

from labeltune.recipes.comparing import compare as compare
from labeltune.recipes.data import check_data as check_data
from labeltune.recipes.data import report_data as report_data
from labeltune.recipes.evaluation import evaluate as evaluate
from labeltune.recipes.exporting import export as export
from labeltune.recipes.planning import plan as plan
from labeltune.recipes.predicting import predict as predict
from labeltune.recipes.training import train as train
