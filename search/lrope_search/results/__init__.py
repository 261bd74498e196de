"""What scores come to: objective, comparison with intervals, table by depth, verdict; knows of no model."""
