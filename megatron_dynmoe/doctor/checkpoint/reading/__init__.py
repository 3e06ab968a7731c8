"""Reads a checkpoint of any format part by part: one tensor of one layer and expert at a time."""
