"""Bounds in numbers and matrices: sample complexity of recovery, and how far pruning by a random or a magnitude mask moves a network."""

from .blocks import Block, Layer
from .iid import Entries, iid_gap, safe_width
from .masks import RULES, BallTerms, DataTerms, ball_terms, data_terms, exact_ball_terms, exact_data_terms
from .propagation import Step, at_most, lipschitz
from .sample_complexity import expected_transition, recovery_probability, samples_for_recovery, statistical_dimension

__all__ = [
    "RULES",
    "BallTerms",
    "Block",
    "DataTerms",
    "Entries",
    "Layer",
    "Step",
    "at_most",
    "ball_terms",
    "data_terms",
    "exact_ball_terms",
    "exact_data_terms",
    "expected_transition",
    "iid_gap",
    "lipschitz",
    "recovery_probability",
    "safe_width",
    "samples_for_recovery",
    "statistical_dimension",
]
