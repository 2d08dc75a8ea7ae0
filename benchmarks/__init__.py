"""The lab, the comparison, and scripts that answer one question or measure one cost each."""
