{{/* What is added to a vLLM pod, whether this chart made it or you did. */}}

{{- define "latentwatch.pluginFolder" -}}/opt/latentwatch/plugin{{- end -}}

{{- define "latentwatch.injectedInitContainers" -}}
{{- if eq .Values.injection.method "initContainer" }}
- name: latentwatch-plugin
  image: {{ include "latentwatch.image" (list .Values.image .Chart.AppVersion) | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [cp, -R, {{ include "latentwatch.pluginFolder" . }}/., /plugin/]
  resources:
    {{- toYaml .Values.injection.resources | nindent 4 }}
  securityContext:
    {{- include "latentwatch.containerSecurityContext" . | nindent 4 }}
  volumeMounts:
    - name: latentwatch-plugin
      mountPath: /plugin
{{- end }}
{{- if eq .Values.mode "sidecar" }}
# Starts before vLLM and ends after it, so that the engine can deliver its last scores.
- name: latentwatch-collector
  restartPolicy: Always
  {{- include "latentwatch.collectorContainer" . | nindent 2 }}
  # A container that keeps ending makes its pod unready, and a watched server would stop serving because its watcher is broken. So the
  # collector starts again inside the container, which has no probes for the same reason; LatentwatchCollectorDown says that it is down.
  command:
    - /bin/sh
    - -c
    - |
      trap 'kill "$pid" 2>/dev/null; wait "$pid"; exit 0' TERM INT
      while :; do
        latentwatch collector "$@" &
        pid=$!
        wait "$pid"
        echo "latentwatch collector ended with code $?; it starts again in 10 seconds" >&2
        sleep 10 &
        pid=$!
        wait "$pid"
      done
    - latentwatch
  args:
    {{- include "latentwatch.collectorArgs" . | nindent 4 }}
  ports:
    - name: lw-http
      containerPort: {{ .Values.collector.httpPort }}
  volumeMounts:
    - name: latentwatch-run
      mountPath: /run/latentwatch
    {{- include "latentwatch.collectorMounts" . | nindent 4 }}
{{- end }}
{{- end -}}

{{- define "latentwatch.injectedEnv" -}}
- name: LATENTWATCH_WATCHLIST
  value: {{ include "latentwatch.artifactPath" (list "watchlist" .Values.watchlist) | quote }}
- name: LATENTWATCH_COLLECTOR
  value: {{ ternary "unix:///run/latentwatch/collector.sock" (include "latentwatch.gatewayAddress" .) (eq .Values.mode "sidecar") | quote }}
- name: LATENTWATCH_REPLICA
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- if .Values.tls.enabled }}
- name: LATENTWATCH_COLLECTOR_CA
  value: /etc/latentwatch/tls/ca.crt
{{- if .Values.tls.engineCertificates }}
- name: LATENTWATCH_COLLECTOR_CERT
  value: /etc/latentwatch/tls/tls.crt
- name: LATENTWATCH_COLLECTOR_KEY
  value: /etc/latentwatch/tls/tls.key
{{- end }}
{{- end }}
{{- with .Values.engineToken }}
- name: LATENTWATCH_COLLECTOR_TOKEN_FILE
  value: /etc/latentwatch/engine-token/{{ .key }}
{{- end }}
{{- if .Values.spool.enabled }}
- name: LATENTWATCH_SPOOL
  value: /var/spool/latentwatch
- name: LATENTWATCH_SPOOL_MIB
  value: {{ int64 .Values.spool.mib | quote }}
{{- end }}
{{- if eq .Values.injection.method "initContainer" }}
- name: PYTHONPATH
  value: {{ list (include "latentwatch.pluginFolder" .) .Values.injection.pythonPath | compact | join ":" | quote }}
{{- end }}
{{- end -}}

{{- define "latentwatch.injectedMounts" -}}
{{ include "latentwatch.mount" "watchlist" }}
{{- if .Values.tls.enabled }}
{{ include "latentwatch.mount" "tls" }}
{{- end }}
{{- if .Values.engineToken }}
{{ include "latentwatch.mount" "engine-token" }}
{{- end }}
{{- if eq .Values.injection.method "initContainer" }}
- name: latentwatch-plugin
  mountPath: {{ include "latentwatch.pluginFolder" . }}
  readOnly: true
{{- end }}
{{- if eq .Values.mode "sidecar" }}
- name: latentwatch-run
  mountPath: /run/latentwatch
{{- end }}
{{- if .Values.spool.enabled }}
- name: latentwatch-spool
  mountPath: /var/spool/latentwatch
{{- end }}
{{- end -}}

{{- define "latentwatch.injectedVolumes" -}}
{{- if eq .Values.mode "sidecar" }}
{{ include "latentwatch.collectorVolumes" . }}
- name: latentwatch-run
  emptyDir: {}
{{- else }}
{{ include "latentwatch.artifactVolume" (list "watchlist" .Values.watchlist true) }}
{{- if .Values.tls.engineCertificates }}
- name: latentwatch-tls
  csi:
    driver: csi.cert-manager.io
    readOnly: true
    volumeAttributes:
      csi.cert-manager.io/issuer-name: {{ .Values.tls.issuer.name }}
      csi.cert-manager.io/issuer-kind: {{ .Values.tls.issuer.kind }}
      # The driver puts in the pod's name, which is LATENTWATCH_REPLICA.
      csi.cert-manager.io/dns-names: ${POD_NAME}
      csi.cert-manager.io/key-usages: digital signature,client auth
      csi.cert-manager.io/fs-group: {{ int64 .Values.runAsUser | quote }}
{{- else if .Values.tls.enabled }}
{{ include "latentwatch.secretVolume" (list "tls" (include "latentwatch.tlsSecret" .) (list "ca.crt") true) }}
{{- end }}
{{- with .Values.engineToken }}
{{ include "latentwatch.secretVolume" (list "engine-token" .name (list .key) true) }}
{{- end }}
{{- end }}
{{- if eq .Values.injection.method "initContainer" }}
- name: latentwatch-plugin
  emptyDir: {}
{{- end }}
{{- if .Values.spool.enabled }}
- name: latentwatch-spool
  {{- toYaml (default (dict "emptyDir" dict) .Values.spool.volume) | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What a pod template gets, from `labels:` on, as a strategic merge patch. */}}
{{- define "latentwatch.podPatch" -}}
metadata:
  labels:
    {{- include "latentwatch.watchedLabel" . | nindent 4 }}
spec:
  {{- with include "latentwatch.injectedInitContainers" . | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .Values.vllm.containerName }}
      env:
        {{- include "latentwatch.injectedEnv" . | nindent 8 }}
      volumeMounts:
        {{- include "latentwatch.injectedMounts" . | trim | nindent 8 }}
  volumes:
    {{- include "latentwatch.injectedVolumes" . | trim | nindent 4 }}
{{- end -}}
