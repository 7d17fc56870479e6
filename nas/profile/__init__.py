"""Where a network's parameters, MACs, bytes and time go; networks side by side; what a space is made of; counters."""

from nas.profile.comparison import Comparison, check_comparable, compare
from nas.profile.comparison_page import comparison_page
from nas.profile.counters import Count, count_all
from nas.profile.measured import Measured, backend_of
from nas.profile.models import model_subject
from nas.profile.network import Latency, Profile, profile, with_counters, with_measured, with_pipeline
from nas.profile.network_page import profile_page
from nas.profile.roof import Roof
from nas.profile.space import SpaceProfile, profile_space
from nas.profile.space_page import space_page
from nas.profile.subject import Subject, candidate_subject

__all__ = [
    "Comparison",
    "Count",
    "Latency",
    "Measured",
    "Profile",
    "Roof",
    "SpaceProfile",
    "Subject",
    "backend_of",
    "candidate_subject",
    "check_comparable",
    "compare",
    "comparison_page",
    "count_all",
    "model_subject",
    "profile",
    "profile_page",
    "profile_space",
    "space_page",
    "with_counters",
    "with_measured",
    "with_pipeline",
]
