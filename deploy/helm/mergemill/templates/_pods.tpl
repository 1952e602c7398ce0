{{/* What the pods of a merge are: one image, no right but what they need. */}}

{{- define "mergemill.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "mergemill.pod" -}}
automountServiceAccountToken: {{ ne .Values.serviceAccountName "" }}
{{- with .Values.serviceAccountName }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "mergemill.container" -}}
{{- $tag := eq .Values.workers.device "cuda" | ternary (printf "%s-cuda" .Chart.AppVersion) .Chart.AppVersion }}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default $tag) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "mergemill.access" -}}
{{- with .Values.secretName }}
envFrom: [{secretRef: {name: {{ . | quote }}}}]
{{- end }}
{{- with .Values.env }}
env:
{{- range $name, $value := . }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
{{- end }}

{{/* The limit of a worker in MiB, as mergemill has it for workers that it starts: what --memory promises, 2 GiB for the
libraries and context of a GPU, and 1 GiB for Python, torch and Dask; or more, where Dask, which pauses a worker at 90 %
of its limit, would do so before the promise and the 384 MiB of the process are reached. */}}
{{- define "mergemill.limitMiB" -}}
{{- $promised := add (mul 1024 .Values.workers.memoryGiB) (eq .Values.workers.device "cpu" | ternary 0 2048) }}
{{- max (add $promised 1024) (div (add (mul 10 (add $promised 384)) 8) 9) }}
{{- end }}

{{- define "mergemill.worker" -}}
replicas: {{ .Values.workers.replicas }}
spec:
  {{- include "mergemill.pod" . | nindent 2 }}
  {{- with .Values.workers.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.workers.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      {{- include "mergemill.container" . | nindent 6 }}
      args:
        - worker
        - --name
        - $(DASK_WORKER_NAME)
        - --nthreads
        - {{ .Values.workers.threads | quote }}
        - --memory-limit
        - {{ include "mergemill.limitMiB" . }}MiB
        - --dashboard-address
        - ":8788"
      {{- include "mergemill.access" . | nindent 6 }}
      ports:
        - {name: http-dashboard, containerPort: 8788, protocol: TCP}
      livenessProbe: {httpGet: {path: /health, port: http-dashboard}, initialDelaySeconds: 30, periodSeconds: 20}
      resources:
        requests: {cpu: {{ .Values.workers.threads | quote }}, memory: {{ include "mergemill.limitMiB" . }}Mi}
        limits:
          memory: {{ include "mergemill.limitMiB" . }}Mi
          {{- if eq .Values.workers.device "cuda" }}
          nvidia.com/gpu: "1"
          {{- end }}
      volumeMounts: [{name: scratch, mountPath: /tmp}]
  volumes: [{name: scratch, emptyDir: {}}]
{{- end }}

{{- define "mergemill.scheduler" -}}
spec:
  {{- include "mergemill.pod" . | nindent 2 }}
  containers:
    - name: scheduler
      {{- include "mergemill.container" . | nindent 6 }}
      args: [scheduler, --host, 0.0.0.0, --port, "8786", --dashboard-address, ":8787"]
      ports:
        - {name: tcp-comm, containerPort: 8786, protocol: TCP}
        - {name: http-dashboard, containerPort: 8787, protocol: TCP}
      readinessProbe: {httpGet: {path: /health, port: http-dashboard}, periodSeconds: 10}
      livenessProbe: {httpGet: {path: /health, port: http-dashboard}, initialDelaySeconds: 15, periodSeconds: 20}
      resources:
        requests: {cpu: "1", memory: {{ .Values.scheduler.memoryGiB }}Gi}
        limits: {memory: {{ .Values.scheduler.memoryGiB }}Gi}
      volumeMounts: [{name: scratch, mountPath: /tmp}]
  volumes: [{name: scratch, emptyDir: {}}]
service:
  type: ClusterIP
  selector: {dask.org/cluster-name: {{ .Release.Name }}, dask.org/component: scheduler}
  ports:
    - {name: tcp-comm, protocol: TCP, port: 8786, targetPort: tcp-comm}
    - {name: http-dashboard, protocol: TCP, port: 8787, targetPort: http-dashboard}
{{- end }}
