"""Ranks that meta-train together: how they are started, meet, sum and agree."""
