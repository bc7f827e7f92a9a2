"""Published numbers: what papers and official repositories print, in which arrangement, and which of our plugins means the same."""
