"""Medical picture files (DICOM, PNG, JPEG, BMP, TIFF, NumPy) read as float pictures in [0, 1]."""
