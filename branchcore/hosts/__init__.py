"""Seams of other trainers: functions with their signatures, on this package's fused exact ops."""
