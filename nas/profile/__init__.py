"""Where a network's parameters, MACs, bytes and time go; what a space is made of; and counters side by side."""

from nas.profile.candidate import Latency, Profile, profile
from nas.profile.candidate_page import profile_page
from nas.profile.counters import Count, compare
from nas.profile.space import SpaceProfile, profile_space
from nas.profile.space_page import space_page

__all__ = [
    "Count",
    "Latency",
    "Profile",
    "SpaceProfile",
    "compare",
    "profile",
    "profile_page",
    "profile_space",
    "space_page",
]
