"""What everything else stands on: errors, reports, random numbers, devices, processes, files."""
