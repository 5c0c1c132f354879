"""The parts of a report: what a log folder holds, its pictures, its tables and the page that shows them."""
