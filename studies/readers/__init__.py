"""Our reading of files beside that of independent readers, over all files that other packages ship as test data.

    python -m studies.readers [--files] [--only dicom,nifti,images]

A file is equal if each of its pictures has the same pixels in each reader that can read it. A source of files is a
`Source` in `SOURCES` of `studies.readers.__main__`.
"""
