"""Layouts of data sets on disk, as downloaded: reading, checking, preparing. One class per layout, reached by entry point."""
