"""Questions asked of a finished first stage, one file each."""
