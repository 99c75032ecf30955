"""Seams of other trainers: functions with the host's own signatures, on branchcore's exact ops.

One file per host; each opens with the host, the version that was read, the seam, what differs and
what is not supported. Nothing is patched and no host is imported.
"""
