"""Maps as files for other programs: DICOM objects for viewers, and arrays."""
