"""Files that make a Ray cluster, and what checks them before they are given to one."""
