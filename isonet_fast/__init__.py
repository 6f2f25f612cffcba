"""Isometric networks (ISONet, R-ISONet) at full GPU speed."""
