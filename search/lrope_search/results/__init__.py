"""Statistics of scores: objective, comparison with intervals, table by depth, verdict."""
