# ./dist_detection.sh configs/detection/retinanet_convmlp_m_fpn_1x_coco.py 8 /path/to/COCO
# Published: box AP 39.4 (AP50 58.7, AP75 42.0); 27.1 M parameters
_base_ = "retinanet_convmlp_s_fpn_1x_coco.py"

model = dict(backbone=dict(arch="convmlp_m"))
