"""Typed weights in one convention: a table of architecture families and its reader, and a bridge for all others."""
