# ./dist_detection.sh configs/detection/maskrcnn_convmlp_m_fpn_1x_coco.py 8 /path/to/COCO
# Published: box AP 40.6 (AP50 61.7, AP75 44.5), mask AP 37.2 (58.8, 39.8); 37.1 M parameters
_base_ = "maskrcnn_convmlp_s_fpn_1x_coco.py"

model = dict(backbone=dict(arch="convmlp_m"))
