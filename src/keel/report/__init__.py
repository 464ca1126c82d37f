"""Reports as one HTML file: of runs (`keel report`) and of reward models (`keel reward`)."""
